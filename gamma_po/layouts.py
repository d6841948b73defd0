"""Layouts: pure functions from tokenised pairs to the rows a model sees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gamma_po.types import ModelInput


def padded(prompts: Sequence[Tensor], completions: Sequence[Tensor], *, pad_id: int) -> ModelInput:
    """One row per sequence, `prompt + completion`, padded on the right.

    Args:
        prompts: S prompts, token ids [n_i], n_i >= 1.
        completions: S completions, token ids [m_i], m_i >= 1.
        pad_id: fills the rows; masked, so any id will do.

    Returns:
        Rows [S, T] with T = max(n_i + m_i).

    >>> rows = padded([torch.tensor([5])], [torch.tensor([6, 7])], pad_id=0)
    >>> rows.input_ids.tolist(), rows.predict_from.tolist(), rows.targets.tolist()
    ([[5, 6, 7]], [0, 1], [6, 7])
    """
    lengths = torch.tensor([len(completion) for completion in completions])
    starts = torch.tensor([len(prompt) for prompt in prompts])
    width = int((starts + lengths).max())
    rows = len(prompts)
    input_ids = torch.full((rows, width), pad_id, dtype=torch.long)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        input_ids[row, : len(prompt)] = prompt
        input_ids[row, len(prompt) : len(prompt) + len(completion)] = completion
    sequence = torch.repeat_interleave(torch.arange(rows), lengths)
    within = torch.arange(len(sequence)) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    return ModelInput(
        input_ids=input_ids,
        attention_mask=(torch.arange(width) < (starts + lengths)[:, None]).long(),
        predict_from=sequence * width + starts[sequence] - 1 + within,
        targets=torch.cat(list(completions)).long(),
        sequence=sequence,
        lengths=lengths,
    )
