"""Score a batch in one forward, or in several that each hold no more than the memory allows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from gamma_po.types import ModelInput, PairLogps, PreferenceBatch


def score(scorer: Callable[[ModelInput], PairLogps], batch: PreferenceBatch) -> PairLogps:
    """Return the log-probabilities of a batch's pairs, whatever number of forwards they are laid out for.

    Where a graph is recorded, all forwards but the last keep none of their activations: the backward pass, which
    begins with the last, computes each again. So at most one forward's activations are in memory at any time, the
    loss still sees all pairs at once, and the gradient is that of one big forward. The price is a second forward
    for those pairs; a batch of one forward pays nothing.

    Args:
        scorer: scores the pairs of one forward.
        batch: P pairs, on the scorer's device.

    Returns:
        [P] each.
    """
    *earlier, last = batch.model_inputs
    if not earlier:
        return scorer(last)
    kept = not torch.is_grad_enabled()
    # A tensor among the arguments tells `checkpoint` whose device's random state (dropout) it has to repeat.
    parts = [
        scorer(rows) if kept else checkpoint(lambda _, rows=rows: scorer(rows), rows.input_ids, use_reentrant=False)
        for rows in earlier
    ]
    return PairLogps.joined([*parts, scorer(last)])
