"""Implicit rewards: from log-probabilities to β-scaled rewards. Pure functions of the evidence."""

from __future__ import annotations

import torch
from torch import Tensor

from gamma_po.types import Evidence, PairLogps, PairRewards


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
    capped = logp.detach().clamp(max=-torch.finfo(logp.dtype).eps)
    logp = capped + (logp - logp.detach())
    return logp - torch.log(-torch.expm1(logp))


def _reference(evidence: Evidence) -> PairLogps:
    """The reference is frozen: no gradient reaches it."""
    assert evidence.reference is not None, "this reward needs the reference's log-probabilities"
    return evidence.reference.detach()
