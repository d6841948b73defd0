"""Write files whole or not at all, and one process at a time."""

from __future__ import annotations

import errno
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

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
