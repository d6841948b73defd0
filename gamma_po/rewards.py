"""Implicit rewards: from log-probabilities to β-scaled rewards. Pure functions of the evidence."""

from __future__ import annotations

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
        Tülu 3, arXiv 2411.15124, eq. 6; also the reward of IPO as its authors run it.
    """
    summed, policy = log_ratio_rewards(evidence, beta), evidence.policy
    return PairRewards(summed.chosen / policy.chosen_length, summed.rejected / policy.rejected_length)


def mean_logp_rewards(evidence: Evidence, beta: float) -> PairRewards:
    """SimPO's reference-free reward: β log π(y) / |y|.

    Source:
        arXiv 2405.14734, eq. 4.
    """
    return PairRewards(beta * evidence.policy.mean_chosen, beta * evidence.policy.mean_rejected)


def _reference(evidence: Evidence) -> PairLogps:
    """The reference is frozen: no gradient reaches it."""
    assert evidence.reference is not None, "this reward needs the reference's log-probabilities"
    return evidence.reference.detach()
