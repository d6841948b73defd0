"""Tokenised pairs as a dataset, with label noise and the reference's log-probabilities beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gamma_po.data.tokenization import TokenizedPair
from gamma_po.layouts import Layout, padded
from gamma_po.types import PairLogps, PreferenceBatch


class Slot(NamedTuple):
    """A place in a batch: which row, and whether it counts (1) or only keeps ranks in step (0)."""

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


class PairDataset(Dataset[Example]):
    """N tokenised pairs.

    Args:
        pairs: in clean order: `chosen` is truly preferred.
        flipped: [N] bool, where the label shown to training is wrong.
        column: [N] a number per pair from the data, or None.
    """

    def __init__(self, pairs: Sequence[TokenizedPair], flipped: Tensor, column: Tensor | None = None) -> None:
        self.pairs = pairs
        self.flipped = flipped
        self.column = column
        self.reference: PairLogps | None = None  # [N] each, in clean order

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, slot: Slot) -> Example:
        pair, flipped = self.pairs[slot.index], bool(self.flipped[slot.index])
        reference = None
        if self.reference is not None:
            reference = PairLogps(*(values[slot.index] for values in self.reference))
        if flipped:
            pair = pair._replace(chosen=pair.rejected, rejected=pair.chosen)
            reference = reference and swapped(reference)
        column = float("nan") if self.column is None else float(self.column[slot.index])
        return Example(slot, pair.prompt, pair.chosen, pair.rejected, flipped, column, reference)

    def digest(self) -> str:
        """Hash of tokens and labels: equal digests mean that training sees the same pairs."""
        digest = hashlib.sha256(self.flipped.numpy().tobytes())
        for pair in self.pairs:
            for ids in (pair.prompt, pair.chosen, pair.rejected):
                digest.update(len(ids).to_bytes(4, "little") + ids.to(torch.int32).numpy().tobytes())
        return digest.hexdigest()[:16]

    def labelled_reference(self) -> PairLogps | None:
        """The reference's log-probabilities with the labels as training sees them, [N] each."""
        if self.reference is None:
            return None
        flipped = swapped(self.reference)
        return PairLogps(*(torch.where(self.flipped, b, a) for a, b in zip(self.reference, flipped, strict=True)))


def by_length(pairs: Sequence[TokenizedPair]) -> list[int]:
    """Return the rows from the shortest pair to the longest, in tokens of prompt and both completions."""
    return sorted(range(len(pairs)), key=lambda i: sum(len(part) for part in pairs[i][:3]))


def swapped(logps: PairLogps) -> PairLogps:
    """Exchange chosen and rejected."""
    return PairLogps(logps.rejected, logps.chosen, logps.rejected_length, logps.chosen_length)


def collate(examples: Sequence[Example], pad_id: int, layout: Layout = padded) -> PreferenceBatch:
    """Lay examples out for the model.

    Args:
        examples: P of them.
        pad_id: fills padding.
        layout: how pairs become rows; see `gamma_po.layouts`.
    """
    parts = [[getattr(example, part) for example in examples] for part in ("prompt", "chosen", "rejected")]
    reference = None
    if examples[0].reference is not None:
        reference = PairLogps(*(torch.stack(values) for values in zip(*(e.reference for e in examples), strict=True)))
    columns = torch.tensor([example.column for example in examples])
    return PreferenceBatch(
        model_input=layout(*parts, pad_id),
        index=torch.tensor([example.slot.index for example in examples]),
        weight=torch.tensor([example.slot.weight for example in examples]),
        flipped=torch.tensor([example.flipped for example in examples]),
        reference=reference,
        column=None if columns.isnan().all() else columns,
    )
