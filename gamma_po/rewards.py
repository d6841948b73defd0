"""Implicit rewards: from log-probabilities to β-scaled rewards. Pure functions of the evidence."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from gamma_po.errors import ConfigError
from gamma_po.types import Evidence, PairLogps, PairRewards

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


def log_ratio_rewards(evidence: Evidence, beta: float) -> PairRewards:
    """DPO's reward: β (log π(y) - log π_ref(y)).

    Args:
        evidence: policy and reference, [P] each.
        beta: reward units per nat, > 0.

    Returns:
        Rewards, [P] each.

    Source:
        arXiv 2305.18290, eq. 5 (without the partition function, which cancels in pairs).
    """
    reference = _reference(evidence)
    return PairRewards(
        beta * (evidence.policy.chosen - reference.chosen),
        beta * (evidence.policy.rejected - reference.rejected),
    )


def mean_log_ratio_rewards(evidence: Evidence, beta: float) -> PairRewards:
    """Length-normalised log-ratio: β (log π(y) - log π_ref(y)) / |y|.

    Source:
        Tülu 3, arXiv 2411.15124; also the reward of IPO as its authors run it.
    """
    summed, policy = log_ratio_rewards(evidence, beta), evidence.policy
    return PairRewards(summed.chosen / policy.chosen_length, summed.rejected / policy.rejected_length)


def logp_rewards(evidence: Evidence, beta: float) -> PairRewards:
    """CPO's reference-free reward: β log π(y), summed over tokens.

    Source:
        CPO, arXiv 2401.08417: DPO's reward under a uniform reference.
    """
    return PairRewards(beta * evidence.policy.chosen, beta * evidence.policy.rejected)


def mean_logp_rewards(evidence: Evidence, beta: float) -> PairRewards:
    """SimPO's reference-free reward: β log π(y) / |y|.

    Source:
        arXiv 2405.14734, eq. 4.
    """
    return PairRewards(beta * evidence.policy.mean_chosen, beta * evidence.policy.mean_rejected)


def log_odds_rewards(evidence: Evidence) -> PairRewards:
    """ORPO's reward: the log-odds of the completion's geometric mean token probability.

    Source:
        arXiv 2403.07691, eqs. 4 and 7.
    """
    return PairRewards(log_odds(evidence.policy.mean_chosen), log_odds(evidence.policy.mean_rejected))


def log_odds(logp: Tensor) -> Tensor:
    """Return log(p / (1 - p)) = m - log(1 - exp(m)) of m = log p.

    A probability that rounding brought to 1 (m = 0) would have infinite odds: above -ε, the machine epsilon of the
    dtype, both value and slope are those at -ε (log-odds 15.9 in float32, 36.0 in float64).

    Args:
        logp: m, [...], nats, <= 0.

    Returns:
        [...].

    Source:
        arXiv 2403.07691, eq. 4.

    >>> log_odds(torch.tensor([0.5, 0.9]).log())
    tensor([0.0000, 2.1972])
    """
    logp = _held(logp, -math.inf, -torch.finfo(logp.dtype).eps)
    return logp - torch.log(-torch.expm1(logp))


def divergence_score(log_ratio: Tensor, divergence: Divergence, alpha: float | None = None) -> Tensor:
    """Return f'(exp(r)) of the divergence's generator f: what stands for the log-ratio r in its reward.

    reverse_kl: r. forward_kl: 1 - exp(-r). js_divergence: log 2 + log s(r). alpha_divergence: (1 - exp(-α r)) / α,
    which lies between the two KL divergences. All grow with r and are 0 at r = 0.

    Where an exponent leaves 0.45 of the dtype's range (beyond ±39.9 in float32, ±319 in float64), value and slope
    are those at its end, so that the score and its square stay finite and no slope is zero.

    Args:
        log_ratio: r = log π(y) - log π_ref(y), [...], nats.
        divergence: its name.
        alpha: α in (0, 1), with alpha_divergence only.

    Returns:
        [...].

    Source:
        f-DPO, arXiv 2309.16240, its table of f'; TRL 1.16's coefficient is 1 - α.

    >>> divergence_score(torch.tensor([1.0, -1.0]), "forward_kl")
    tensor([ 0.6321, -1.7183])
    """
    limit = 0.45 * math.log(torch.finfo(log_ratio.dtype).max)
    if divergence == "reverse_kl":
        return log_ratio
    if divergence == "js_divergence":
        return math.log(2) + functional.logsigmoid(_held(log_ratio, -math.inf, limit))
    power = 1.0 if alpha is None else alpha
    exponent = -_held(power * log_ratio, -limit, limit)
    growth = torch.exp(exponent)  # the slope of expm1, which torch takes from expm1 + 1: 0 where that rounds to 0
    return -(torch.expm1(exponent.detach()) + (growth - growth.detach())) / power


def _held(values: Tensor, low: float, high: float) -> Tensor:
    """Values within the limits, with the gradient of the identity."""
    return values.detach().clamp(low, high) + (values - values.detach())


def _reference(evidence: Evidence) -> PairLogps:
    """The reference is frozen: no gradient reaches it."""
    if evidence.reference is None:
        raise ConfigError("this loss's rewards need the reference's log-probabilities, but Evidence.reference=None")
    return evidence.reference.detach()
