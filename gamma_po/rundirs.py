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
        nearest = next(path for path in (self.parent, *self.parent.absolute().parents) if os.path.lexists(path))
        reason = None if nearest.is_dir() else f"{nearest} is no folder"
        if reason is None and not os.access(nearest, os.W_OK | os.X_OK):
            reason = f"{nearest} may not be written to"
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
