"""Losses that judge each completion on its own or compare whole batches, by their papers' formulas."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gamma_po.losses import build_loss, gradient_weight
from gamma_po.types import Evidence
from tests import oracle
from tests.contracts import STRICT, LossContract, random_evidence


def sides(evidence: Evidence, target_margin: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Rewards of chosen and rejected, each asked for half of γ."""
    policy, reference = evidence.policy, evidence.reference
    chosen = beta * (policy.chosen - reference.chosen) - target_margin.detach() / 2
    return chosen, beta * (policy.rejected - reference.rejected) + target_margin.detach() / 2


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x)."""
    return 1 / (1 + torch.exp(-x))


class TestKTOPair(LossContract):
    name = "kto_pair"
    options = ({"beta": 0.1}, {"beta": 0.03})
    undoes = "both"
    fixed_statistics = True

    def expected(self, evidence: Evidence, target_margin: Tensor, **options: Any) -> Tensor:
        beta, policy, reference = options["beta"], evidence.policy, evidence.reference
        chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
        kl_chosen, kl_rejected = (max(0.0, sum(side.tolist()) / len(side)) for side in (chosen, rejected))
        desirable = 1 - sigmoid(beta * (chosen - kl_rejected) - target_margin.detach() / 2)
        undesirable = 1 - sigmoid(beta * (kl_chosen - rejected) - target_margin.detach() / 2)
        return desirable + undesirable

    def test_gradient_weight_takes_the_batch_kl_as_a_constant(self) -> None:
        evidence, target_margin = random_evidence(), torch.full((6,), 0.4, dtype=torch.float64)
        chosen, rejected = sides(evidence, target_margin, 0.1)
        kl = max(0.0, rejected.sub(target_margin / 2).mean().item())
        value = sigmoid(chosen - kl)
        weight = gradient_weight(build_loss("kto_pair"), evidence, target_margin)
        torch.testing.assert_close(weight, value * (1 - value), rtol=STRICT, atol=STRICT)

    def test_negative_batch_kl_counts_as_zero(self) -> None:
        evidence, none = random_evidence(), torch.zeros(6, dtype=torch.float64)
        below = evidence._replace(
            reference=evidence.policy._replace(chosen=evidence.policy.chosen + 3, rejected=evidence.policy.rejected + 2)
        )
        expected = 1 / (1 + math.exp(-0.3)) + 1 / (1 + math.exp(0.2))
        assert build_loss("kto_pair")(below, none).tolist() == pytest.approx([expected] * 6, abs=1e-14)


class TestNCAPair(LossContract):
    name = "nca_pair"
    options = ({"beta": 0.1}, {"beta": 0.5})
    undoes = "both"

    def expected(self, evidence: Evidence, target_margin: Tensor, **options: Any) -> Tensor:
        chosen, rejected = sides(evidence, target_margin, options["beta"])
        noise = torch.log(sigmoid(-chosen) * sigmoid(-rejected)) / 2
        return -torch.log(sigmoid(chosen)) - noise


class TestBCOPair(LossContract):
    name = "bco_pair"
    options = ({"beta": 0.1}, {"beta": 0.3, "shift": "batch"})
    undoes = "both"
    fixed_statistics = True

    def expected(self, evidence: Evidence, target_margin: Tensor, **options: Any) -> Tensor:
        beta, delta = options["beta"], 0.0
        if options.get("shift") == "batch":
            unshifted = sides(evidence, torch.zeros(()), beta)
            delta = sum(unshifted[0].tolist() + unshifted[1].tolist()) / (2 * len(target_margin))
        chosen, rejected = sides(evidence, target_margin, beta)
        return -oracle.log_sigmoid(chosen - delta) - torch.log(1 - sigmoid(rejected - delta))

    def test_gradient_weight_takes_the_shift_as_a_constant(self) -> None:
        evidence, none = random_evidence(), torch.zeros(6, dtype=torch.float64)
        chosen, rejected = sides(evidence, none, 0.1)
        delta = torch.cat([chosen, rejected]).mean()
        weight = gradient_weight(build_loss("bco_pair", shift="batch"), evidence, none)
        torch.testing.assert_close(weight, sigmoid(delta - chosen), rtol=STRICT, atol=STRICT)


class TestSPPOHard(LossContract):
    name = "sppo_hard"
    options = ({"beta": 0.1}, {"beta": 0.5})
    undoes = "both"

    def expected(self, evidence: Evidence, target_margin: Tensor, **options: Any) -> Tensor:
        policy, reference, beta = evidence.policy, evidence.reference, options["beta"]
        target = (1 + target_margin.detach()) / (2 * beta)
        chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
        return (chosen - target) ** 2 + (rejected + target) ** 2


class TestAPOZero(LossContract):
    name = "apo_zero"
    options = ({"beta": 0.1}, {"beta": 0.5})
    undoes = "both"

    def expected(self, evidence: Evidence, target_margin: Tensor, **options: Any) -> Tensor:
        chosen, rejected = sides(evidence, target_margin, options["beta"])
        return 1 - sigmoid(chosen) + sigmoid(rejected)


class TestAPODown(LossContract):
    name = "apo_down"
    options = ({"beta": 0.1}, {"beta": 0.5})
    undoes = "both"

    def expected(self, evidence: Evidence, target_margin: Tensor, **options: Any) -> Tensor:
        chosen, rejected = sides(evidence, target_margin, options["beta"])
        return sigmoid(chosen) + 1 - sigmoid(chosen - rejected)


def partners(mine: Tensor, others: Tensor) -> Tensor:
    """The other sample's value that has as many values below it; by counting, with a graph."""
    below = [sum(other < value for other in mine.tolist()) for value in mine.tolist()]
    by_rank = {sum(other < value for other in others.tolist()): i for i, value in enumerate(others.tolist())}
    return others[torch.tensor([by_rank[count] for count in below])]


def smoothed(x: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of the smoothed label."""
    return -(1 - smoothing) * oracle.log_sigmoid(x) - smoothing * oracle.log_sigmoid(-x)


class TestAOT(LossContract):
    name = "aot"
    options = ({"beta": 0.1}, {"beta": 0.3, "label_smoothing": 0.2})

    def expected(self, evidence: Evidence, target_margin: Tensor, **options: Any) -> Tensor:
        beta = options["beta"]
        policy = beta * (evidence.policy.chosen - evidence.policy.rejected) - target_margin.detach()
        reference = beta * (evidence.reference.chosen - evidence.reference.rejected)
        return smoothed(policy - partners(policy, reference).detach(), options.get("label_smoothing", 0.0))


class TestAOTUnpaired(LossContract):
    name = "aot_unpaired"
    options = ({"beta": 0.1}, {"beta": 0.3, "label_smoothing": 0.2})
    undoes = "both"

    def expected(self, evidence: Evidence, target_margin: Tensor, **options: Any) -> Tensor:
        chosen, rejected = sides(evidence, target_margin, options["beta"])
        return smoothed(chosen - partners(chosen, rejected), options.get("label_smoothing", 0.0))


def test_one_pair_alone_makes_both_transport_losses_dpo() -> None:
    target_margin = torch.tensor([0.3], dtype=torch.float64)
    for name in ("aot", "aot_unpaired"):
        alone = build_loss(name)(random_evidence(1), target_margin)
        assert alone.tolist() == pytest.approx(build_loss("dpo")(random_evidence(1), target_margin).tolist(), abs=1e-14)


def test_no_matching_of_chosen_and_rejected_has_a_smaller_sum_of_losses_than_the_sorted_one() -> None:
    """Sorting is the optimal transport for a convex cost of the difference: no permutation does better."""
    evidence, none = random_evidence(5), torch.zeros(5, dtype=torch.float64)
    best = build_loss("aot_unpaired", beta=1.0)(evidence, none).sum()
    chosen, rejected = sides(evidence, none, 1.0)
    costs = [-oracle.log_sigmoid(chosen - rejected[list(order)]).sum() for order in itertools.permutations(range(5))]
    assert best <= min(costs) + STRICT
