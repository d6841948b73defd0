"""How many tokens a forward holds, and how pairs are cut into forwards by tokens: pure functions of lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from itertools import pairwise

from gamma_po.data.tokenization import TokenizedPair
from gamma_po.errors import ConfigError, require

# Layout -> tokens of one pair from the lengths of prompt, chosen and rejected. The padded layout gives each pair two
# rows, both filled up to the longest row of the forward; the others put pairs side by side and fill nothing.
WIDTHS: dict[str, Callable[[int, int, int], int]] = {
    "padded": lambda prompt, chosen, rejected: prompt + max(chosen, rejected),
    "packed": lambda prompt, chosen, rejected: 2 * prompt + chosen + rejected,
    "shared_prefix": lambda prompt, chosen, rejected: prompt + chosen + rejected,
}


@dataclass(frozen=True)
class TokenCosts:
    """Tokens held by forwards over some of N pairs, padding included.

    `2 P max_i w_i` in the padded layout, `Σ_i w_i` in the others; w as in `WIDTHS`.

    Args:
        widths: w, [N].
        padded: rows are filled up to the longest.

    >>> costs = TokenCosts(widths=(3, 9, 4, 8), padded=True)
    >>> costs.total([0, 1]), costs.balanced([0, 1, 2, 3], 2)
    (36, [[0, 2], [3, 1]])
    """

    widths: tuple[int, ...]
    padded: bool

    @classmethod
    def of(cls, pairs: Sequence[TokenizedPair], layout: str) -> TokenCosts:
        """Measure pairs (anything with prompt, chosen, rejected) under the layout of that name."""
        width = WIDTHS[layout]
        widths = tuple(width(len(pair.prompt), len(pair.chosen), len(pair.rejected)) for pair in pairs)
        return cls(widths, padded=layout == "padded")

    def total(self, rows: Sequence[int]) -> int:
        """Return the tokens of one forward over these pairs."""
        widths = [self.widths[row] for row in rows]
        return 2 * len(widths) * max(widths) if self.padded else sum(widths)

    def balanced(self, rows: Sequence[int], count: int) -> list[list[int]]:
        """Cut pairs into exactly `count` parts whose largest is small.

        Where rows are filled up, pairs of like length go together, and no other cut of the sorted pairs has a smaller
        largest part. Where nothing is filled up, each pair goes to the emptiest part, the longest pair first.

        Args:
            rows: at least `count` of them.
            count: of parts, >= 1; none of them is empty.
        """
        ordered = sorted(rows, key=lambda row: self.widths[row])
        return self._sorted_parts(ordered, count) if self.padded else self._even_parts(ordered, count)

    def within(self, rows: Sequence[int], limit: int) -> list[list[int]]:
        """Cut pairs into few parts of at most `limit` tokens each.

        A pair that alone holds more is a part of its own; `too_long` finds such pairs beforehand.

        Returns:
            One part, the rows as they came, if they fit together.
        """
        parts = [list(rows)]
        while len(parts) < len(rows) and max(self.total(part) for part in parts) > limit:
            parts = self.balanced(rows, len(parts) + 1)
        return parts

    def too_long(self, limit: int) -> int | None:
        """Return the longest pair if it alone holds more than `limit` tokens, else None."""
        longest = max(range(len(self.widths)), key=lambda row: self.widths[row])
        return longest if self.total([longest]) > limit else None

    def _even_parts(self, ordered: Sequence[int], count: int) -> list[list[int]]:
        parts: list[list[int]] = [[] for _ in range(count)]
        filled = [(0, place) for place in range(count)]  # a heap: tokens in a part, which part
        for row in reversed(ordered):
            tokens, place = filled[0]
            parts[place].append(row)
            heapreplace(filled, (tokens + self.widths[row], place))
        return parts

    def _sorted_parts(self, ordered: Sequence[int], count: int) -> list[list[int]]:
        low, high = self.total(ordered[-1:]), self.total(ordered)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if len(self._filled(ordered, middle)) <= count else (middle + 1, high)
        parts = self._filled(ordered, low)
        while len(parts) < count:  # fewer sufficed; halves of a part hold less than the part
            largest = max((i for i in range(len(parts)) if len(parts[i]) > 1), key=lambda i: self.total(parts[i]))
            half = len(parts[largest]) // 2
            parts[largest : largest + 1] = [parts[largest][:half], parts[largest][half:]]
        return parts

    def _filled(self, ordered: Sequence[int], limit: int) -> list[list[int]]:
        """Fill parts with the sorted pairs in turn, each up to the limit."""
        starts = [0]
        for place, row in enumerate(ordered):
            if 2 * (place - starts[-1] + 1) * self.widths[row] > limit and place > starts[-1]:
                starts.append(place)
        return [list(ordered[start:end]) for start, end in pairwise([*starts, len(ordered)])]


def check_layout(layout: str, length_window: int | None) -> None:
    """Refuse a layout that is not there, and a window that would do nothing in it.

    Raises:
        ConfigError: naming the options and what is allowed.
    """
    require(layout in WIDTHS, "data.layout", layout, ", ".join(WIDTHS))
    if length_window is not None and length_window > 1 and layout != "padded":
        raise ConfigError(
            f"data.length_window={length_window} is of no use with data.layout={layout}, which pads nothing; "
            "allowed here: 1, or null"
        )
