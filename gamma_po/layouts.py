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


def shared_prefix(
    prompts: Sequence[Tensor], chosen: Sequence[Tensor], rejected: Sequence[Tensor], pad_id: int
) -> ModelInput:
    """One row per pair, `prompt + chosen + rejected`: the prompt is encoded once.

    Both completions see the prompt and themselves, not each other; the rejected one's positions start again
    where the prompt ends; the first token of both is predicted from the prompt's last position.

    Args:
        prompts, chosen, rejected, pad_id: as for `padded`.

    Returns:
        Rows [P, T] with T = max(prompt + chosen + rejected), and a mask [P, 1, T, T], True where a token may look.

    >>> rows = shared_prefix([torch.tensor([5])], [torch.tensor([6])], [torch.tensor([7])], pad_id=0)
    >>> rows.predict_from.tolist(), rows.position_ids.tolist(), rows.attention_mask[0, 0].int().tolist()
    ([0, 0], [[0, 1, 1]], [[1, 0, 0], [1, 1, 0], [1, 0, 1]])
    """
    starts, first, second = _lengths(prompts), _lengths(chosen), _lengths(rejected)
    input_ids = _filled([torch.cat(row) for row in zip(prompts, chosen, rejected, strict=True)], pad_id)
    width = input_ids.shape[1]
    column = torch.arange(width)
    ends = torch.stack([starts, starts + first, starts + first + second])
    segment = (column >= ends[:, :, None]).sum(0)  # 0 prompt, 1 chosen, 2 rejected, 3 padding
    looks_at = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
    mask = looks_at & (column[None, :] <= column[:, None])
    lengths = torch.cat([first, second])
    sequence, within = _token_places(lengths)
    pair, is_rejected = sequence % len(prompts), sequence >= len(prompts)
    before = starts[pair] + torch.where(is_rejected, first[pair], 0) - 1 + within  # the token before, in its own part
    before = torch.where(within == 0, starts[pair] - 1, before)
    return ModelInput(
        input_ids=input_ids,
        attention_mask=mask[:, None],
        position_ids=torch.where(segment >= 2, column - first[:, None], column).clamp_min(0),
        predict_from=pair * width + before,
        targets=torch.cat([*chosen, *rejected]).long(),
        sequence=sequence,
        lengths=lengths,
    )


LAYOUTS: dict[str, Layout] = {"padded": padded, "shared_prefix": shared_prefix}


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
