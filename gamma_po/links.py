"""Links: from a reward margin h and a target margin γ to a loss per pair. Elementwise, float32 or float64."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def logistic(reward_margin: Tensor, target_margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return (1 - ε) ℓ(h - γ) + ε ℓ(-(h - γ)) with ℓ(z) = log(1 + exp(-z)).

    Args:
        reward_margin: h, [P].
        target_margin: γ, [P].
        label_smoothing: ε in [0, 0.5): the share of labels assumed to be wrong.

    Returns:
        [P].

    Source:
        arXiv 2305.18290, eq. 7; ε: Mitchell, "A note on DPO with noisy preferences" (2023), cDPO.

    >>> import torch
    >>> logistic(torch.zeros(1), torch.zeros(1))
    tensor([0.6931])
    """
    excess = reward_margin - target_margin
    loss = functional.softplus(-excess)
    if label_smoothing == 0:
        return loss
    return (1 - label_smoothing) * loss + label_smoothing * functional.softplus(excess)


def squared(distance: Tensor, target: Tensor) -> Tensor:
    """Return (d - target)².

    Source:
        IPO, arXiv 2310.12036, eq. 17.
    """
    return (distance - target).square()
