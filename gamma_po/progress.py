"""Progress bars for work outside the trainer's own loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")


def track(items: Iterable[Item], description: str, *, total: int | None = None, visible: bool = True) -> Iterator[Item]:
    """Iterate with a progress bar that appears once the work has taken two seconds.

    Args:
        items: what to iterate over.
        description: what is being done, for the reader.
        total: number of items, where `items` has no length.
        visible: False on ranks that should stay quiet.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    return iter(tqdm(items, desc=description, total=total, delay=2, disable=not visible, dynamic_ncols=True))
