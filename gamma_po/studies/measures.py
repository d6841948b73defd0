"""What a policy is worth: exact sums over the responses of held-out prompts.

The policy is π ∝ π_ref exp(α f) for scores f; α = 1 is the policy as trained.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gamma_po.studies.worlds import HeldOut

NEWTON_STEPS = 16
STEP_TOLERANCE = 1e-6
TEMPERATURES = (0.0, *(2.0 ** (power / 4) for power in range(-40, 41)))  # in units of 1 / the scores' spread
KL_TOLERANCE = 1e-3  # relative; a KL further from its target than this was not reachable


class Outcome(NamedTuple):
    """Means over the held-out prompts, [...] each."""

    win_rate: Tensor  # P(gold of a draw from π > gold of a draw from π_ref), ties half
    kl: Tensor  # KL(π ‖ π_ref), nats
    gold: Tensor  # mean gold reward of π minus that of π_ref


class Judge:
    """Measures policies on the held-out prompts of one world.

    Args:
        held_out: of one world: [M, K, F], [M, K], [M, K].
    """

    def __init__(self, held_out: HeldOut) -> None:
        self.reference, self.gold = held_out.reference.double().log_softmax(-1), held_out.gold.double()
        self.probability = self.reference.exp()
        difference = self.gold[:, :, None] - self.gold[:, None, :]
        beats = (difference > 0).double() + 0.5 * (difference == 0).double()
        self.beats = (beats * self.probability[:, None, :]).sum(-1)  # [M, K] P(response beats a reference draw)
        distinct = self.probability[:, :, None] * self.probability[:, None, :] * (difference > 0)
        self.pair_weight = distinct / distinct.sum()  # [M, K, K]: y better than y', both from π_ref
        self.exists = torch.isfinite(self.reference)

    def outcome(self, scores: Tensor, scale: Tensor | float = 1.0) -> Outcome:
        """Measure π ∝ π_ref exp(scale · f).

        Args:
            scores: f, [..., M, K].
            scale: α, [...] or one number.
        """
        policy, log_ratio = self._policy(scores, torch.as_tensor(scale, dtype=torch.float64))
        kl = (policy * log_ratio).sum(-1).mean(-1)
        win_rate = (policy * self.beats).sum(-1).mean(-1)
        gold = ((policy - self.probability) * self.gold).sum(-1).mean(-1)
        return Outcome(win_rate, kl, gold)

    def pair_accuracy(self, scores: Tensor) -> Tensor:
        """P(f orders a pair as gold does), pairs of distinct gold drawn from π_ref, ties half; [..., M, K] -> [...]."""
        f = scores.double()
        found = torch.empty(f.shape[:-2], dtype=torch.float64)
        for index in torch.cartesian_prod(*map(torch.arange, f.shape[:-2])).reshape(found.numel(), -1):
            one = f[tuple(index)]
            difference = one[:, :, None] - one[:, None, :]
            hits = (difference > 0).double() + 0.5 * (difference == 0).double()
            found[tuple(index)] = (hits * self.pair_weight).sum()
        return found

    def scale_for(self, scores: Tensor, kl: float) -> Tensor:
        """Return α > 0 such that KL(π_α ‖ π_ref) = kl, [...]; NaN where no α gets there.

        Newton's method on log KL as a function of log α, which is nearly a line of slope 2.
        """
        log_alpha = -scores.double().masked_fill(~self.exists, 0).square().mean((-2, -1)).clamp_min(1e-30).log() / 2
        target = torch.as_tensor(kl, dtype=torch.float64)
        for _ in range(NEWTON_STEPS):
            alpha = log_alpha.exp()
            value, slope = self._kl_and_slope(scores, alpha)
            step = (value.clamp_min(1e-300).log() - target.log()) / (alpha * slope / value).clamp_min(0.05)
            step = step.nan_to_num(0).clamp(-2, 2)
            log_alpha = log_alpha - step
            if step.abs().max() < STEP_TOLERANCE:
                break
        reached = self._kl_and_slope(scores, log_alpha.exp())[0]
        return torch.where((reached / target - 1).abs() < KL_TOLERANCE, log_alpha.exp(), torch.nan)

    def _kl_and_slope(self, scores: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """KL and dKL/dα = α Var_π(f), means over prompts."""
        f = scores.double()
        policy, log_ratio = self._policy(scores, alpha)
        mean = (policy * f).sum(-1, keepdim=True)
        variance = (policy * (f - mean).square()).sum(-1).mean(-1)
        return (policy * log_ratio).sum(-1).mean(-1), alpha * variance

    def _policy(self, scores: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """π and log π - log π_ref, [..., M, K]."""
        raised = scale[..., None, None] * scores.double()
        normaliser = torch.logsumexp(self.reference + raised, -1, keepdim=True)
        log_ratio = raised - normaliser
        return (self.reference + log_ratio).exp(), log_ratio


def log_likelihoods(gap: Tensor) -> Tensor:
    """Return each pair's log s(c gap) with the c >= 0 that is best for all of them together.

    Args:
        gap: f_chosen - f_rejected as labelled, [..., N], nats.

    >>> log_likelihoods(torch.tensor([1.0, -1.0])).exp()
    tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    scaled = gap.double() / gap.double().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
    tried = [torch.nn.functional.logsigmoid(c * scaled) for c in TEMPERATURES]
    best = torch.stack([values.mean(-1) for values in tried]).argmax(0)
    return torch.stack(tried).gather(0, best[None, ..., None].expand(1, *gap.shape))[0]
