"""Every run gets a directory of its own."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

from gamma_po.errors import ConfigError


class RunDirectory:
    """A new folder `root/name/DATE-TIME`.

    Args:
        root: where runs are kept.
        name: what this kind of run is called.
    """

    def __init__(self, root: str = "runs", name: str = "run") -> None:
        self.root, self.name = root, name

    def create(self) -> Path:
        """Make the folder and return it; processes of one distributed run agree on it.

        Raises:
            ConfigError: the folder cannot be made.
        """
        parent = Path(self.root).expanduser() / self.name
        shared = os.environ.get("GAMMA_PO_RUN")
        if shared is not None:
            return Path(shared)
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        try:
            parent.mkdir(parents=True, exist_ok=True)
            for attempt in range(1000):
                folder = parent / (now if attempt == 0 else f"{now}-{attempt}")
                try:
                    folder.mkdir()
                except FileExistsError:
                    continue
                os.environ["GAMMA_PO_RUN"] = str(folder)
                return folder
        except OSError as error:
            raise ConfigError(f"run.root={self.root!r}: no folder can be made there: {error}") from error
        raise ConfigError(f"run.root={self.root!r}: a thousand runs were started there this second")
