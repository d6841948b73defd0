"""Progress bars for work outside the trainer's own loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")


def track(
    items: Iterable[Item], description: str, *, total: int | None = None, visible: bool = True, delay: float = 2
) -> Iterator[Item]:
    """Iterate with a progress bar that is not shown for work of a moment.

    Args:
        items: what to iterate over.
        description: what is being done, for the reader.
        total: number of items, where `items` has no length.
        visible: False on ranks that should stay quiet.
        delay: seconds that the work must have taken by the end of an item before the bar appears; 0 shows it at once.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    return iter(tqdm(items, desc=description, total=total, delay=delay, disable=not visible, dynamic_ncols=True))
