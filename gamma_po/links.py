"""Links: from a reward margin h and a target margin γ to a loss per pair. Elementwise, float32 or float64.

All are functions of the excess h - γ. `ℓ(z) = -log s(z)`, s the logistic function.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def log_loss(z: Tensor) -> Tensor:
    """Return ℓ(z) = log(1 + exp(-z)), exact to rounding for every z.

    Args:
        z: [...].

    Returns:
        [...].

    >>> log_loss(torch.tensor([0.0, -1e5]))
    tensor([6.9315e-01, 1.0000e+05])
    """
    return -functional.logsigmoid(z)


def logistic(reward_margin: Tensor, target_margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return (1 - ε) ℓ(h - γ) + ε ℓ(-(h - γ)).

    Args:
        reward_margin: h, [P].
        target_margin: γ, [P].
        label_smoothing: ε in [0, 0.5): the share of labels assumed to be wrong.

    Returns:
        [P].

    Source:
        arXiv 2305.18290, eq. 7; ε: Mitchell, "A note on DPO with noisy preferences" (2023), cDPO.

    >>> logistic(torch.zeros(1), torch.zeros(1))
    tensor([0.6931])
    """
    excess = reward_margin - target_margin
    if label_smoothing == 0:
        return log_loss(excess)
    return (1 - label_smoothing) * log_loss(excess) + label_smoothing * log_loss(-excess)


def robust_logistic(reward_margin: Tensor, target_margin: Tensor, flip_rate: float) -> Tensor:
    """Return [(1 - ε) ℓ(h - γ) - ε ℓ(-(h - γ))] / (1 - 2ε), unbiased when a share ε of the labels is flipped.

    Not bounded below: it falls like -ε (h - γ) / (1 - 2ε) for large h.

    Args:
        reward_margin: h, [P].
        target_margin: γ, [P].
        flip_rate: ε in [0, 0.5).

    Returns:
        [P].

    Source:
        arXiv 2403.00409, the robust DPO loss.

    >>> robust_logistic(torch.tensor([1.0]), torch.tensor([0.0]), 0.1)
    tensor([0.1883])
    """
    excess = reward_margin - target_margin
    return ((1 - flip_rate) * log_loss(excess) - flip_rate * log_loss(-excess)) / (1 - 2 * flip_rate)


def hinge(reward_margin: Tensor, target_margin: Tensor) -> Tensor:
    """Return max(0, 1 + γ - h).

    Source:
        SLiC-HF, arXiv 2305.10425, its calibration loss; on log-ratios: RSO, arXiv 2309.06657, hinge-norm.

    >>> hinge(torch.tensor([0.0, 3.0]), torch.tensor([0.5, 0.5]))
    tensor([1.5000, 0.0000])
    """
    return torch.relu(1 - (reward_margin - target_margin))


def squared(distance: Tensor, target: Tensor) -> Tensor:
    """Return (d - target)².

    Source:
        IPO, arXiv 2310.12036, eq. 17.

    >>> squared(torch.tensor([3.0]), torch.tensor([1.0]))
    tensor([4.])
    """
    return (distance - target).square()


def reverse_kl(reward_margin: Tensor, target_margin: Tensor, label_smoothing: float) -> Tensor:
    """Return KL(p ‖ q) of p = (s(x), s(-x)), x = h - γ, from the smoothed label q = (1 - ε, ε).

    Smallest, 0, at x = log((1 - ε)/ε): the one turning point.

    Args:
        reward_margin: h, [P].
        target_margin: γ, [P].
        label_smoothing: ε in (0, 0.5).

    Returns:
        [P].

    Source:
        EXO, arXiv 2402.00856, eq. 16.

    >>> reverse_kl(torch.tensor([0.0]), torch.tensor([0.0]), 0.25)
    tensor([0.1438])
    """
    excess = reward_margin - target_margin
    right = torch.sigmoid(excess) * (-log_loss(excess) - math.log1p(-label_smoothing))
    wrong = torch.sigmoid(-excess) * (-log_loss(-excess) - math.log(label_smoothing))
    return right + wrong


def log_ratio_modulated(reward_margin: Tensor, target_margin: Tensor, temperature: float) -> Tensor:
    """Return (1 - m) ℓ(x) + m exp(-x), m = s(x/τ), x = h - γ.

    The product m exp(-x) is taken in the logarithm, so that it stays finite where exp(-x) alone overflows.

    Args:
        reward_margin: h, [P].
        target_margin: γ, [P].
        temperature: τ in (0, 1].

    Returns:
        [P].

    Source:
        DiscoPOP, arXiv 2406.08414, eq. 5.

    >>> log_ratio_modulated(torch.tensor([0.0]), torch.tensor([0.0]), 0.05)
    tensor([0.8466])
    """
    excess = reward_margin - target_margin
    exponential = torch.exp(-excess - log_loss(excess / temperature))
    return torch.sigmoid(-excess / temperature) * log_loss(excess) + exponential
