"""Every run gets a directory of its own."""

from __future__ import annotations

import datetime
import itertools
import os
from pathlib import Path

from gamma_po.errors import ConfigError


def free_path(path: Path) -> Path:
    """Return `path`, or where something has that name already, the first free one of `path-1`, `path-2`, ..."""
    names = itertools.chain([path.name], (f"{path.name}-{number}" for number in itertools.count(1)))
    return next(free for name in names if not os.path.lexists(free := path.with_name(name)))


def why_not_writable(folder: Path) -> str | None:
    """Return why nothing can be written to a folder that may have to be made first; None if it can."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir():
        return f"{nearest} is no folder"
    return None if os.access(nearest, os.W_OK | os.X_OK) else f"{nearest} may not be written to"


class RunDirectory:
    """A new folder `root/name/DATE-TIME`.

    Args:
        root: where runs are kept.
        name: what this kind of run is called.
    """

    def __init__(self, root: str = "runs", name: str = "run") -> None:
        self.root, self.name = root, name

    @property
    def parent(self) -> Path:
        """Where runs of this name lie."""
        return Path(self.root).expanduser() / self.name

    def check(self) -> None:
        """Say whether the folder could be made, and make nothing.

        Raises:
            ConfigError: something there is no folder, or may not be written to.
        """
        reason = why_not_writable(self.parent)
        if reason is not None:
            raise ConfigError(f"run.root={self.root!r}: no folder can be made there: {reason}")

    def create(self) -> Path:
        """Make the folder and return it. Only the first process of a run calls this; the others ask it.

        Raises:
            ConfigError: the folder cannot be made.
        """
        self.check()
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        try:
            self.parent.mkdir(parents=True, exist_ok=True)
            for attempt in range(1000):
                folder = self.parent / (now if attempt == 0 else f"{now}-{attempt}")
                try:
                    folder.mkdir()
                except FileExistsError:
                    continue
                return folder
        except OSError as error:
            raise ConfigError(f"run.root={self.root!r}: no folder can be made there: {error}") from error
        raise ConfigError(f"run.root={self.root!r}: a thousand runs were started there this second")
