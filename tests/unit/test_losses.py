"""Every loss by its paper's formula, and the laws all losses obey."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gamma_po.errors import ConfigError
from gamma_po.losses import LOSSES, build_loss
from gamma_po.types import Evidence
from tests import oracle
from tests.contracts import LossContract, random_evidence


class TestDPO(LossContract):
    name = "dpo"
    options = ({"beta": 0.1}, {"beta": 0.7, "label_smoothing": 0.2})

    def expected(self, evidence: Evidence, target_margin: Tensor, **options: Any) -> Tensor:
        policy, reference = evidence.policy, evidence.reference
        ratio_gap = torch.log(torch.exp(policy.chosen - policy.rejected - reference.chosen + reference.rejected))
        x = options["beta"] * ratio_gap - target_margin.detach()
        smoothing = options.get("label_smoothing", 0.0)
        return -(1 - smoothing) * oracle.log_sigmoid(x) - smoothing * oracle.log_sigmoid(-x)


class TestSimPO(LossContract):
    name = "simpo"
    options = ({"beta": 2.0}, {"beta": 10.0})

    def expected(self, evidence: Evidence, target_margin: Tensor, **options: Any) -> Tensor:
        policy, beta = evidence.policy, options["beta"]
        reward_gap = beta * policy.chosen / policy.chosen_length - beta * policy.rejected / policy.rejected_length
        return -oracle.log_sigmoid(reward_gap - target_margin.detach())


class TestIPO(LossContract):
    name = "ipo"
    options = ({"beta": 0.1}, {"beta": 0.5, "length_norm": False})

    def expected(self, evidence: Evidence, target_margin: Tensor, **options: Any) -> Tensor:
        policy, reference, beta = evidence.policy, evidence.reference, options["beta"]
        chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
        if options.get("length_norm", True):
            chosen, rejected = chosen / policy.chosen_length, rejected / policy.rejected_length
        return (chosen - rejected - 1 / (2 * beta) - target_margin.detach() / beta) ** 2


def test_dpo_is_ln_2_where_policy_and_reference_agree() -> None:
    evidence = random_evidence()
    value = build_loss("dpo")(evidence._replace(reference=evidence.policy), torch.zeros(6, dtype=torch.float64))
    assert value.tolist() == pytest.approx([math.log(2)] * 6, abs=1e-15)


def test_dpo_stays_finite_and_right_at_extreme_rewards() -> None:
    evidence = random_evidence(2)
    far = evidence.policy._replace(chosen=torch.tensor([-1e5, -1.0]), rejected=torch.tensor([-1.0, -1e5]))
    zero = evidence.policy._replace(chosen=torch.zeros(2), rejected=torch.zeros(2))
    value = build_loss("dpo", beta=1.0)(Evidence(far, zero), torch.zeros(2))
    assert value.tolist() == pytest.approx([99999.0, 0.0], rel=1e-6)


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 0.9])
def test_label_smoothing_outside_its_range_is_refused(smoothing: float) -> None:
    with pytest.raises(ConfigError, match=r"dpo.label_smoothing=.*0 <= ε < 0.5"):
        build_loss("dpo", label_smoothing=smoothing)


def test_an_unknown_loss_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError, match=r"unknown loss 'dop'; allowed: dpo, ipo, simpo"):
        build_loss("dop")


def test_every_loss_says_its_name_formula_and_source() -> None:
    for name, loss in LOSSES.items():
        assert loss.name == name and loss.formula and loss.source and "Source:" in loss.__doc__
