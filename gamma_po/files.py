"""Write files whole or not at all, and one process at a time."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

WRITING = ".writing"  # ends the name of the file that says who writes another one
ABANDONED = 3600.0  # seconds without a change, after which nobody on any machine writes a file any more
DISK_REFUSES = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
DISK_ADVICE = (
    "the disk takes no more; files that were finished before are whole. Free some space, then repeat the command; "
    "`fit` goes on from --ckpt_path RUN/checkpoints/last.ckpt"
)


def write_text(path: Path, content: str) -> None:
    """Write text beside the target and rename it into place."""
    write_bytes(path, content.encode())


def disk_refuses(error: OSError) -> bool:
    """Whether a disk is full, over its quota, or read-only."""
    return error.errno in DISK_REFUSES


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes beside the target and rename them into place; a failure leaves nothing behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def acquired(lock: FileLock, *, blocking: bool = True) -> bool:
    """Take a lock, or return False if another holds it; go on without one where the file system has none."""
    try:
        lock.acquire(blocking=blocking)
    except Timeout:
        return False
    except (OSError, NotImplementedError) as error:
        log.warning("%s cannot be locked (%s): a second process would do the same work too", lock.lock_file, error)
    return True


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock, waiting for whoever holds it; it ends with the process at the latest."""
    lock = FileLock(file)
    acquired(lock)
    try:
        yield
    finally:
        lock.release()


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def being_written(path: Path) -> Iterator[None]:
    """Show other processes that this one writes a file or a folder; this ends with the process at the latest.

    What is written is to be renamed or removed inside. What is left of it, if the process is killed, is known by the
    file `.NAME.writing` beside it, which no living process has locked (`abandoned`).

    Args:
        path: of a name that has `.partial` in it, in a folder that is there.
    """
    sign = path.with_name(f".{path.name}{WRITING}")
    with _held(sign):
        try:
            yield
        finally:
            if not os.path.lexists(path):
                sign.unlink(missing_ok=True)


@contextmanager
def _held(sign: Path) -> Iterator[None]:
    """Hold the lock of a file, which is made; once more where another process has removed it in the meantime."""
    while True:
        with open(sign, "ab") as file:
            with suppress(OSError):  # a file system without locks: nobody can tell, and nobody removes it
                fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, sign):
                yield
                return


def _is_at(file: IO[bytes], place: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), place.lstat())
    except FileNotFoundError:
        return False


def abandoned(folder: Path, *, for_seconds: float = 0.0) -> Iterator[Path]:
    """Yield what processes were writing in a folder when they were killed (`being_written`), to be removed at once.

    What a living process writes is left out, and so is all of which this cannot be told: where the file system has no
    locks, or in a folder of others.

    Args:
        folder: may be missing.
        for_seconds: without a change. Some file systems do not show locks to other machines: less than `ABANDONED` only
            where no living process on another machine is to be expected.
    """
    for sign in folder.glob(f".*.partial*{WRITING}"):
        with suppress(OSError), open(sign, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path = sign.with_name(sign.name.removeprefix(".").removesuffix(WRITING))
            here = _is_at(file, sign)  # else another process was faster
            if here and time.time() - _last_change(sign, path, *path.glob("**/*")) >= for_seconds:
                yield path
                if not os.path.lexists(path):
                    sign.unlink()


def _last_change(*paths: Path) -> float:
    return max(path.lstat().st_mtime for path in paths if os.path.lexists(path))
