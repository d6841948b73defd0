"""Tokenised pairs as a dataset, with label noise and the reference's log-probabilities beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gamma_po.data.batching import TokenCosts
from gamma_po.data.tokenization import TokenizedPair
from gamma_po.layouts import Layout, padded
from gamma_po.types import PairLogps, PreferenceBatch


class Slot(NamedTuple):
    """A place in a batch: which row, and what it counts for: 0 where it only keeps ranks in step."""

    index: int
    weight: float = 1.0


class Example(NamedTuple):
    """One pair as labelled: `chosen` is what the (perhaps wrong) label prefers."""

    slot: Slot
    prompt: Tensor
    chosen: Tensor
    rejected: Tensor
    flipped: bool
    column: float
    reference: PairLogps | None


Cut = Callable[[Sequence[Example]], list[list[Example]]]


class PairDataset(Dataset[Example]):
    """N tokenised pairs.

    Args:
        pairs: in clean order: `chosen` is truly preferred.
        flipped: [N] bool, where the label shown to training is wrong.
        column: [N] a number per pair from the data, or None: by how much `chosen` is better, in clean order. A pair
            whose label is wrong shows its negative, as a file would in which its completions had changed places.
    """

    def __init__(self, pairs: Sequence[TokenizedPair], flipped: Tensor, column: Tensor | None = None) -> None:
        self.pairs = pairs
        self.flipped = flipped
        self.column = column
        self.reference: PairLogps | None = None  # [N] each, in clean order
        self.scored_as: object = None  # what the reference's numbers depend on
        self._digest: str | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, slot: Slot) -> Example:
        pair, flipped = self.pairs[slot.index], bool(self.flipped[slot.index])
        reference = None
        if self.reference is not None:
            reference = self.reference.map(lambda values: values[slot.index])
        if flipped:
            pair = pair._replace(chosen=pair.rejected, rejected=pair.chosen)
            reference = reference and reference.swapped()
        column = float("nan") if self.column is None else float(self.column[slot.index])
        column = -column if flipped else column
        return Example(slot, pair.prompt, pair.chosen, pair.rejected, flipped, column, reference)

    def digest(self) -> str:
        """Hash of tokens, labels and column, computed once: equal ones mean that training sees the same pairs."""
        self._digest = self._digest or self._compute_digest()
        return self._digest

    def _compute_digest(self) -> str:
        digest = hashlib.sha256(self.flipped.numpy().tobytes())
        if self.column is not None:
            digest.update(b"column" + self.column.numpy().tobytes())
        for pair in self.pairs:
            for ids in (pair.prompt, pair.chosen, pair.rejected):
                digest.update(len(ids).to_bytes(4, "little") + ids.to(torch.int32).numpy().tobytes())
        return digest.hexdigest()[:16]

    def labelled_column(self) -> Tensor | None:
        """The column's numbers with the labels as training sees them, [N], float32."""
        return None if self.column is None else torch.where(self.flipped, -self.column, self.column).float()

    def labelled_reference(self) -> PairLogps | None:
        """The reference's log-probabilities with the labels as training sees them, [N] each."""
        if self.reference is None:
            return None
        swapped = self.reference.swapped()
        return PairLogps(
            *(a if a is None else torch.where(self.flipped, b, a) for a, b in zip(self.reference, swapped, strict=True))
        )


def by_length(pairs: Sequence[TokenizedPair]) -> list[int]:
    """Return the rows from the shortest pair to the longest, in tokens of prompt and both completions."""
    return sorted(range(len(pairs)), key=lambda i: sum(len(part) for part in pairs[i][:3]))


def collate(
    examples: Sequence[Example], pad_id: int, layout: Layout = padded, cut: Cut | None = None
) -> PreferenceBatch:
    """Lay examples out for the model.

    Args:
        examples: P of them.
        pad_id: fills padding.
        layout: how pairs become rows; see `gamma_po.layouts`.
        cut: divides the examples where they are too many for one forward; None leaves them together.
    """
    forwards = [list(examples)] if cut is None else cut(examples)
    examples = [example for forward in forwards for example in forward]
    reference = None
    if examples[0].reference is not None:
        fields = zip(*(example.reference for example in examples), strict=True)
        reference = PairLogps(*(None if values[0] is None else torch.stack(values) for values in fields))
    columns = torch.tensor([example.column for example in examples])
    return PreferenceBatch(
        model_inputs=tuple(layout(*_parts(forward), pad_id) for forward in forwards),
        index=torch.tensor([example.slot.index for example in examples]),
        weight=torch.tensor([example.slot.weight for example in examples]),
        flipped=torch.tensor([example.flipped for example in examples]),
        reference=reference,
        column=None if columns.isnan().all() else columns,
    )


def cut_by_tokens(examples: Sequence[Example], *, layout: str, limit: int) -> list[list[Example]]:
    """Divide examples so that no forward holds more than `limit` tokens under the layout, padding included."""
    parts = TokenCosts.of(examples, layout).within(range(len(examples)), limit)
    return [[examples[place] for place in part] for part in parts]


def _parts(examples: Sequence[Example]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return [e.prompt for e in examples], [e.chosen for e in examples], [e.rejected for e in examples]
