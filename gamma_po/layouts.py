"""Layouts: pure functions from tokenised pairs to the rows a model sees.

To add one: write `layout(prompts, chosen, rejected, pad_id) -> ModelInput` and name it in LAYOUTS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gamma_po.types import ModelInput

Layout = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], int], ModelInput]


def padded(prompts: Sequence[Tensor], chosen: Sequence[Tensor], rejected: Sequence[Tensor], pad_id: int) -> ModelInput:
    """One row per completion, `prompt + completion`, padded on the right: all chosen, then all rejected.

    Args:
        prompts: P prompts, token ids [n_i], n_i >= 1.
        chosen: P completions, token ids [m_i], m_i >= 1.
        rejected: likewise.
        pad_id: fills the rows; masked, so any id will do.

    Returns:
        Rows [2P, T] with T = max(n_i + m_i).
    """
    return padded_sequences([*prompts, *prompts], [*chosen, *rejected], pad_id)


def padded_sequences(prompts: Sequence[Tensor], completions: Sequence[Tensor], pad_id: int) -> ModelInput:
    """One row per sequence, `prompt + completion`, padded on the right.

    Args:
        prompts: S prompts, token ids [n_i], n_i >= 1.
        completions: S completions, token ids [m_i], m_i >= 1.
        pad_id: fills the rows.

    Returns:
        Rows [S, T].

    >>> rows = padded_sequences([torch.tensor([5])], [torch.tensor([6, 7])], pad_id=0)
    >>> rows.input_ids.tolist(), rows.predict_from.tolist(), rows.targets.tolist()
    ([[5, 6, 7]], [0, 1], [6, 7])
    """
    starts, lengths = _lengths(prompts), _lengths(completions)
    rows = [torch.cat([prompt, completion]) for prompt, completion in zip(prompts, completions, strict=True)]
    input_ids = _filled(rows, pad_id)
    width = input_ids.shape[1]
    sequence, within = _token_places(lengths)
    return ModelInput(
        input_ids=input_ids,
        attention_mask=(torch.arange(width) < (starts + lengths)[:, None]).long(),
        position_ids=None,
        predict_from=sequence * width + starts[sequence] - 1 + within,
        targets=torch.cat(list(completions)).long(),
        sequence=sequence,
        lengths=lengths,
    )


def packed(prompts: Sequence[Tensor], chosen: Sequence[Tensor], rejected: Sequence[Tensor], pad_id: int) -> ModelInput:
    """All `prompt + completion` sequences in one row, nothing padded: all chosen, then all rejected.

    Args:
        prompts, chosen, rejected: as for `padded`.
        pad_id: not read.

    Returns:
        One row [1, T], T = 2 sum(n_i) + sum(m_i), with a group per sequence.

    >>> row = packed([torch.tensor([5])], [torch.tensor([6])], [torch.tensor([7])], pad_id=0)
    >>> row.input_ids.tolist(), row.position_ids.tolist(), row.predict_from.tolist(), row.groups
    ([[5, 6, 5, 7]], [[0, 1, 0, 1]], [0, 2], ((2,), (2,)))
    """
    starts, lengths = _lengths([*prompts, *prompts]), _lengths([*chosen, *rejected])
    totals = starts + lengths
    sequence, within = _token_places(lengths)
    completions = [*chosen, *rejected]
    rows = [torch.cat(pieces) for pieces in zip([*prompts, *prompts], completions, strict=True)]
    return ModelInput(
        input_ids=torch.cat(rows).long()[None],
        attention_mask=None,
        position_ids=_token_places(totals)[1][None],
        predict_from=(totals.cumsum(0) - totals + starts)[sequence] - 1 + within,
        targets=torch.cat(completions).long(),
        sequence=sequence,
        lengths=lengths,
        groups=tuple((total,) for total in totals.tolist()),
    )


def shared_prefix(
    prompts: Sequence[Tensor], chosen: Sequence[Tensor], rejected: Sequence[Tensor], pad_id: int
) -> ModelInput:
    """All pairs in one row, nothing padded, a pair as `prompt + chosen + rejected`: the prompt is encoded once.

    Both completions see the prompt and themselves, not each other; the rejected one's positions start again
    where the prompt ends; the first token of both is predicted from the prompt's last position.

    Args:
        prompts, chosen, rejected: as for `padded`.
        pad_id: not read.

    Returns:
        One row [1, T], T = sum(prompt + chosen + rejected), with a group per pair.

    >>> row = shared_prefix([torch.tensor([5])], [torch.tensor([6])], [torch.tensor([7])], pad_id=0)
    >>> row.input_ids.tolist(), row.position_ids.tolist(), row.predict_from.tolist(), row.groups
    ([[5, 6, 7]], [[0, 1, 1]], [0, 0], ((1, 1, 1),))
    """
    starts, first, second = _lengths(prompts), _lengths(chosen), _lengths(rejected)
    totals = starts + first + second
    offset = totals.cumsum(0) - totals
    pair_of, column = _token_places(totals)
    lengths = torch.cat([first, second])
    sequence, within = _token_places(lengths)
    pair, is_rejected = sequence % len(prompts), sequence >= len(prompts)
    before = starts[pair] + torch.where(is_rejected, first[pair], 0) - 1 + within  # the token before, in its own part
    before = torch.where(within == 0, starts[pair] - 1, before)
    return ModelInput(
        input_ids=torch.cat([part for parts in zip(prompts, chosen, rejected, strict=True) for part in parts]).long()[
            None
        ],
        attention_mask=None,
        position_ids=torch.where(column >= (starts + first)[pair_of], column - first[pair_of], column)[None],
        predict_from=offset[pair] + before,
        targets=torch.cat([*chosen, *rejected]).long(),
        sequence=sequence,
        lengths=lengths,
        groups=tuple(zip(starts.tolist(), first.tolist(), second.tolist(), strict=True)),
    )


LAYOUTS: dict[str, Layout] = {"padded": padded, "packed": packed, "shared_prefix": shared_prefix}


def _lengths(sequences: Sequence[Tensor]) -> Tensor:
    return torch.tensor([len(sequence) for sequence in sequences])


def _filled(rows: Sequence[Tensor], pad_id: int) -> Tensor:
    """Rows of different lengths as one tensor, filled up on the right."""
    return torch.nn.utils.rnn.pad_sequence([row.long() for row in rows], batch_first=True, padding_value=pad_id)


def _token_places(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """For each completion token: its sequence, and its place within it."""
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    within = torch.arange(len(sequence)) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    return sequence, within
