"""Losses made of losses: what they add up to, whose rewards they have, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gamma_po.errors import ConfigError
from gamma_po.losses import DPO, IPO, SFT, BCOPair, Hinge, KTOPair, SimPO, WeightedSum, WithSFT, build_loss
from gamma_po.types import Evidence
from tests import oracle
from tests.contracts import STRICT, LossContract, random_evidence


def dpo(evidence: Evidence, target_margin: Tensor, beta: float) -> Tensor:
    """ℓ(β (r_w - r_l) - γ)."""
    policy, reference = evidence.policy, evidence.reference
    gap = policy.chosen - policy.rejected - reference.chosen + reference.rejected
    return -oracle.log_sigmoid(beta * gap - target_margin.detach())


class TestSFT(LossContract):
    name = "sft"
    options = ({},)
    positive = ()

    def expected(self, evidence: Evidence, target_margin: Tensor, **options: Any) -> Tensor:
        return evidence.policy.chosen.abs() / evidence.policy.chosen_length


class TestWithSFT(LossContract):
    name = "with_sft"
    options = ({"loss": DPO(beta=0.2)}, {"loss": DPO(beta=0.2), "sft_weight": 0.3})
    positive = ("sft_weight",)

    def expected(self, evidence: Evidence, target_margin: Tensor, **options: Any) -> Tensor:
        nll = evidence.policy.chosen.abs() / evidence.policy.chosen_length
        return dpo(evidence, target_margin, 0.2) + options.get("sft_weight", 1.0) * nll


class TestWeightedSum(LossContract):
    name = "weighted_sum"
    options = ({"losses": (DPO(beta=0.2), SFT(), Hinge(beta=0.2)), "weights": (1.0, 0.5, 0.25)},)
    positive = ()

    def expected(self, evidence: Evidence, target_margin: Tensor, **options: Any) -> Tensor:
        policy, reference = evidence.policy, evidence.reference
        h = 0.2 * (policy.chosen - policy.rejected - reference.chosen + reference.rejected)
        hinge = torch.clamp(1 + target_margin.detach() - h, min=0)
        nll = policy.chosen.abs() / policy.chosen_length
        return dpo(evidence, target_margin, 0.2) + 0.5 * nll + 0.25 * hinge


def test_the_default_sum_is_mpo() -> None:
    evidence, target_margin = random_evidence(), torch.linspace(-1, 1, 6, dtype=torch.float64)
    policy, reference = evidence.policy, evidence.reference
    chosen = 0.1 * (policy.chosen - reference.chosen) - target_margin / 2
    rejected = 0.1 * (policy.rejected - reference.rejected) + target_margin / 2
    quality = -oracle.log_sigmoid(chosen) - oracle.log_sigmoid(-rejected)
    generation = -policy.chosen / policy.chosen_length
    expected = 0.8 * dpo(evidence, target_margin, 0.1) + 0.2 * quality + 1.0 * generation
    torch.testing.assert_close(build_loss("weighted_sum")(evidence, target_margin), expected, rtol=STRICT, atol=STRICT)


@pytest.mark.parametrize("inner", [DPO(), SimPO(), SFT(), KTOPair(), BCOPair(shift="batch")])
def test_a_likelihood_term_leaves_rewards_and_needs_as_they_are(inner: Any) -> None:
    both = WithSFT(loss=inner)
    for wrapped in (both, WeightedSum(losses=(inner, SFT()), weights=(1.0, 1.0))):
        assert wrapped.needs_reference is inner.needs_reference
        assert wrapped.centers_kl is inner.centers_kl
        assert wrapped.takes_margin is inner.takes_margin
        assert wrapped.couples_pairs is inner.couples_pairs
        assert torch.equal(wrapped.rewards(random_evidence()).margin, inner.rewards(random_evidence()).margin)


def test_a_sum_has_the_rewards_of_its_first_loss() -> None:
    mixed = WeightedSum(losses=(SimPO(), IPO()), weights=(1.0, 1.0))
    assert torch.equal(mixed.rewards(random_evidence()).chosen, SimPO().rewards(random_evidence()).chosen)
    assert mixed.needs_reference and not mixed.centers_kl


@pytest.mark.parametrize(
    ("losses", "weights", "message"),
    [
        ((), (), r"weighted_sum.losses=\[\] is not allowed; allowed: at least one loss"),
        ((SFT(), DPO()), (1.0, 1.0), r"weighted_sum.losses=\['sft', 'dpo'\].*a first loss that compares"),
        ((DPO(), SFT()), (1.0,), r"weighted_sum.weights=\(1.0,\).*2 numbers > 0, one for each of \['dpo', 'sft'\]"),
        ((DPO(), SFT()), (1.0, float("inf")), r"weighted_sum.weights=\(1.0, inf\).*all finite"),
        ((DPO(), SFT()), (1.0, 0.0), r"weighted_sum.weights=\(1.0, 0.0\).*2 numbers > 0"),
    ],
)
def test_sums_that_cannot_work_are_refused(losses: Any, weights: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WeightedSum(losses=losses, weights=weights)
