"""Losses of the reward margin by their papers' formulas, and the laws all losses obey."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gamma_po.errors import ConfigError
from gamma_po.losses import LOSSES, Loss, build_loss
from gamma_po.rewards import log_odds
from gamma_po.types import Evidence
from tests import oracle
from tests.contracts import STRICT, LossContract, random_evidence


def log_ratios(evidence: Evidence) -> tuple[Tensor, Tensor]:
    """r_w and r_l, nats."""
    policy, reference = evidence.policy, evidence.reference
    return policy.chosen - reference.chosen, policy.rejected - reference.rejected


class TestDPO(LossContract):
    name = "dpo"
    options = ({"beta": 0.1}, {"beta": 0.7, "label_smoothing": 0.2})

    def expected(self, evidence: Evidence, target_margin: Tensor, **options: Any) -> Tensor:
        policy, reference = evidence.policy, evidence.reference
        ratio_gap = torch.log(torch.exp(policy.chosen - policy.rejected - reference.chosen + reference.rejected))
        x = options["beta"] * ratio_gap - target_margin.detach()
        smoothing = options.get("label_smoothing", 0.0)
        return -(1 - smoothing) * oracle.log_sigmoid(x) - smoothing * oracle.log_sigmoid(-x)


class TestRobustDPO(LossContract):
    name = "robust_dpo"
    options = ({"beta": 0.1}, {"beta": 0.4, "label_smoothing": 0.3}, {"label_smoothing": 0.0})

    def expected(self, evidence: Evidence, target_margin: Tensor, **options: Any) -> Tensor:
        """The loss whose mean under flips is the loss on true labels: solve the 2 x 2 system for it."""
        chosen, rejected = log_ratios(evidence)
        x, flips = options.get("beta", 0.1) * (chosen - rejected) - target_margin, options.get("label_smoothing", 0.1)
        true_labels = -torch.stack([oracle.log_sigmoid(x), oracle.log_sigmoid(-x)])
        channel = torch.tensor([[1 - flips, flips], [flips, 1 - flips]], dtype=torch.float64)
        return torch.linalg.solve(channel, true_labels)[0]


class TestSimPO(LossContract):
    name = "simpo"
    options = ({"beta": 2.0}, {"beta": 10.0})

    def expected(self, evidence: Evidence, target_margin: Tensor, **options: Any) -> Tensor:
        policy, beta = evidence.policy, options["beta"]
        reward_gap = beta * policy.chosen / policy.chosen_length - beta * policy.rejected / policy.rejected_length
        return -oracle.log_sigmoid(reward_gap - target_margin.detach())


class TestDPONorm(LossContract):
    name = "dpo_norm"
    options = ({}, {"beta": 0.5})

    def expected(self, evidence: Evidence, target_margin: Tensor, **options: Any) -> Tensor:
        beta, policy = options.get("beta", 5.0), evidence.policy
        chosen, rejected = log_ratios(evidence)
        x = beta * (chosen / policy.chosen_length) - beta * (rejected / policy.rejected_length) - target_margin
        return torch.log(1 + torch.exp(-x))


class TestIPO(LossContract):
    name = "ipo"
    options = ({"beta": 0.1}, {"beta": 0.5, "length_norm": False})

    def expected(self, evidence: Evidence, target_margin: Tensor, **options: Any) -> Tensor:
        policy, reference, beta = evidence.policy, evidence.reference, options["beta"]
        chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
        if options.get("length_norm", True):
            chosen, rejected = chosen / policy.chosen_length, rejected / policy.rejected_length
        return (chosen - rejected - 1 / (2 * beta) - target_margin.detach() / beta) ** 2


class TestHinge(LossContract):
    name = "hinge"
    options = ({"beta": 0.1}, {"beta": 0.02})

    def expected(self, evidence: Evidence, target_margin: Tensor, **options: Any) -> Tensor:
        chosen, rejected = log_ratios(evidence)
        shortfall = 1 + target_margin.detach() - options["beta"] * (chosen - rejected)
        return torch.where(shortfall > 0, shortfall, 0.0)


class TestCPO(LossContract):
    name = "cpo"
    options = ({"beta": 0.1}, {"beta": 0.3, "sft_weight": 0.25}, {"sft_weight": 0.0})

    def expected(self, evidence: Evidence, target_margin: Tensor, **options: Any) -> Tensor:
        policy = evidence.policy
        preferred = torch.exp(options.get("beta", 0.1) * (policy.chosen - policy.rejected)) * torch.exp(-target_margin)
        likelihood = policy.chosen / policy.chosen_length
        return -torch.log(preferred / (1 + preferred)) - options.get("sft_weight", 1.0) * likelihood


class TestORPO(LossContract):
    name = "orpo"
    options = ({}, {"odds_ratio_weight": 0.7})
    positive = ("odds_ratio_weight",)

    def expected(self, evidence: Evidence, target_margin: Tensor, **options: Any) -> Tensor:
        policy = evidence.policy
        chosen = torch.exp(policy.chosen / policy.chosen_length)
        rejected = torch.exp(policy.rejected / policy.rejected_length)
        odds_ratio = chosen / (1 - chosen) / (rejected / (1 - rejected)) * torch.exp(-target_margin)
        preference = -torch.log(odds_ratio / (1 + odds_ratio))
        return -torch.log(chosen) + options.get("odds_ratio_weight", 0.1) * preference

    def moved(self, loss: Loss, evidence: Evidence, chosen: Tensor | float, rejected: Tensor | float) -> Evidence:
        """Log-odds are not linear in the log-probability: p = odds / (1 + odds)."""

        def add(logp: Tensor, length: Tensor, amount: Tensor | float) -> Tensor:
            p = torch.exp(logp / length)
            odds = p / (1 - p) * torch.exp(torch.as_tensor(amount, dtype=torch.float64))
            return length * torch.log(odds / (1 + odds))

        policy = evidence.policy
        moved_chosen = add(policy.chosen, policy.chosen_length, chosen)
        moved_rejected = add(policy.rejected, policy.rejected_length, rejected)
        return evidence._replace(policy=policy._replace(chosen=moved_chosen, rejected=moved_rejected))


class TestRDPO(LossContract):
    name = "rdpo"
    options = ({"beta": 0.1}, {"beta": 0.3, "alpha": 0.05}, {"alpha": 0.0})

    def expected(self, evidence: Evidence, target_margin: Tensor, **options: Any) -> Tensor:
        """DPO on the rewards r + α n that are implied by a reward with the penalty -α n."""
        chosen, rejected = log_ratios(evidence)
        beta, alpha, policy = options.get("beta", 0.1), options.get("alpha", 0.01), evidence.policy
        better = torch.exp(beta * chosen + alpha * policy.chosen_length.double() - target_margin.detach())
        worse = torch.exp(beta * rejected + alpha * policy.rejected_length.double())
        return -torch.log(better / (better + worse))


class TestDPOP(LossContract):
    name = "dpop"
    options = ({"beta": 0.1, "penalty": 5.0}, {"beta": 0.05, "penalty": 0.5})

    def expected(self, evidence: Evidence, target_margin: Tensor, **options: Any) -> Tensor:
        chosen, rejected = log_ratios(evidence)
        fallen = torch.log(torch.clamp(torch.exp(-chosen), min=1.0))  # log max(1, π_ref/π)
        x = options["beta"] * (chosen - rejected - options["penalty"] * fallen) - target_margin.detach()
        return torch.log1p(torch.exp(-x))


class TestEXOPair(LossContract):
    name = "exo_pair"
    options = ({"beta": 0.1}, {"beta": 0.3, "label_smoothing": 0.25})

    def expected(self, evidence: Evidence, target_margin: Tensor, **options: Any) -> Tensor:
        """KL(p ‖ q) = Σ p log(p/q) of the policy's distribution over the two completions from the smoothed label."""
        chosen, rejected = log_ratios(evidence)
        scores = torch.stack([options["beta"] * chosen - target_margin.detach(), options["beta"] * rejected])
        p = torch.exp(scores) / torch.exp(scores).sum(dim=0)
        smoothing = options.get("label_smoothing", 1e-3)
        q = torch.tensor([1 - smoothing, smoothing], dtype=torch.float64)[:, None]
        return (p * torch.log(p / q)).sum(dim=0)


class TestDiscoPOP(LossContract):
    name = "discopop"
    options = ({"beta": 0.1}, {"beta": 0.3, "tau": 1.0})

    def expected(self, evidence: Evidence, target_margin: Tensor, **options: Any) -> Tensor:
        chosen, rejected = log_ratios(evidence)
        x = options["beta"] * (chosen - rejected) - target_margin.detach()
        mixture = 1 / (1 + torch.exp(-x / options.get("tau", 0.05)))
        return (1 - mixture) * -oracle.log_sigmoid(x) + mixture * torch.exp(-x)


def test_dpo_is_ln_2_where_policy_and_reference_agree() -> None:
    evidence = random_evidence()
    value = build_loss("dpo")(evidence._replace(reference=evidence.policy), torch.zeros(6, dtype=torch.float64))
    assert value.tolist() == pytest.approx([math.log(2)] * 6, abs=1e-15)


def test_dpo_stays_right_at_extreme_rewards() -> None:
    evidence = random_evidence(2)
    far = evidence.policy._replace(chosen=torch.tensor([-1e5, -1.0]), rejected=torch.tensor([-1.0, -1e5]))
    zero = evidence.policy._replace(chosen=torch.zeros(2), rejected=torch.zeros(2))
    value = build_loss("dpo", beta=1.0)(Evidence(far, zero), torch.zeros(2))
    assert value.tolist() == pytest.approx([99999.0, 0.0], rel=1e-6)


def test_fixed_margin_simpo_is_simpo_as_printed_with_gamma_over_beta() -> None:
    evidence, beta, gamma_beta_ratio = random_evidence(), 2.5, 0.4
    policy = evidence.policy
    gap = policy.chosen / policy.chosen_length - policy.rejected / policy.rejected_length
    printed = -oracle.log_sigmoid(beta * (gap - gamma_beta_ratio))
    ours = build_loss("simpo", beta=beta)(evidence, torch.full((6,), beta * gamma_beta_ratio, dtype=torch.float64))
    torch.testing.assert_close(ours, printed, rtol=STRICT, atol=STRICT)


def test_rdpo_pushes_a_pair_less_when_the_chosen_completion_is_the_longer_one() -> None:
    evidence = random_evidence(1)
    lengths = [(10, 20), (20, 20), (30, 20)]
    losses = []
    for chosen_length, rejected_length in lengths:
        policy = evidence.policy._replace(
            chosen_length=torch.tensor([chosen_length]), rejected_length=torch.tensor([rejected_length])
        )
        losses.append(build_loss("rdpo")(evidence._replace(policy=policy), torch.zeros(1, dtype=torch.float64)).item())
    assert losses[0] > losses[1] > losses[2]


def test_robust_dpo_averages_to_dpo_when_labels_flip_at_its_rate() -> None:
    evidence, none = random_evidence(), torch.zeros(6, dtype=torch.float64)

    def flipped(logps: Any) -> Any:
        return type(logps)(logps.rejected, logps.chosen, logps.rejected_length, logps.chosen_length)

    swapped = Evidence(flipped(evidence.policy), flipped(evidence.reference))
    robust = build_loss("robust_dpo", label_smoothing=0.2)
    mean = 0.8 * robust(evidence, none) + 0.2 * robust(swapped, none)
    torch.testing.assert_close(mean, build_loss("dpo")(evidence, none), rtol=STRICT, atol=STRICT)


def test_log_odds_of_a_certain_token_are_those_of_machine_epsilon() -> None:
    for dtype in (torch.float32, torch.float64):
        eps = torch.finfo(dtype).eps
        logp = torch.tensor([0.0, -eps / 4, -eps], dtype=dtype, requires_grad=True)
        value = log_odds(logp)
        value.sum().backward()
        assert value.tolist() == pytest.approx([-math.log(eps)] * 3, rel=1e-6)
        assert logp.grad.tolist() == pytest.approx([1 / eps] * 3, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "option", "value", "allowed"),
    [
        ("dpo", "label_smoothing", -0.1, "0 <= ε < 0.5"),
        ("dpo", "label_smoothing", 0.5, "0 <= ε < 0.5"),
        ("robust_dpo", "label_smoothing", 0.5, "0 <= ε < 0.5"),
        ("aot", "label_smoothing", 0.5, "0 <= ε < 0.5"),
        ("aot_unpaired", "label_smoothing", 0.9, "0 <= ε < 0.5"),
        ("exo_pair", "label_smoothing", 0.0, "0 < ε < 0.5"),
        ("discopop", "tau", 0.0, "0 < τ <= 1"),
        ("discopop", "tau", 1.5, "0 < τ <= 1"),
        ("rdpo", "alpha", -1.0, "a number >= 0"),
        ("rdpo", "alpha", math.inf, "a number >= 0"),
        ("cpo", "sft_weight", math.inf, "a number >= 0"),
        ("dpop", "penalty", -1.0, "a number >= 0"),
        ("cpo", "sft_weight", -1.0, "a number >= 0"),
        ("bco_pair", "shift", "running", "none, batch"),
    ],
)
def test_options_outside_their_range_are_refused(name: str, option: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}.{option}={value!r} is not allowed; allowed: {allowed}"):
        build_loss(name, **{option: value})


def test_an_unknown_loss_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError) as error:
        build_loss("dop")
    assert str(error.value) == f"unknown loss 'dop'; allowed: {', '.join(sorted(LOSSES))}"


def test_every_loss_says_its_name_formula_and_source() -> None:
    for name, loss in LOSSES.items():
        assert loss.name == name and loss.formula and loss.source and "Source:" in loss.__doc__


def test_every_loss_passes_the_contract() -> None:
    import tests.unit.test_losses_batch as batch
    import tests.unit.test_losses_beta as beta
    import tests.unit.test_losses_combined as combined
    import tests.unit.test_losses_wrapped as wrapped

    modules = globals(), *map(vars, (batch, beta, combined, wrapped))
    contracts = [value for module in modules for value in module.values()]
    tested = {
        value.name
        for value in contracts
        if isinstance(value, type) and hasattr(value, "undoes") and hasattr(value, "name")
    }
    assert tested == set(LOSSES)


def test_rewards_without_the_reference_they_are_measured_from_are_refused() -> None:
    evidence = random_evidence()._replace(reference=None)
    with pytest.raises(ConfigError, match=r"rewards need the reference's log-probabilities, but Evidence.ref"):
        build_loss("dpo").rewards(evidence)
    with pytest.raises(ConfigError, match=r"the loss 'ld_dpo' needs the reference's log-probabilities, which are not"):
        build_loss("ld_dpo").rewards(evidence)
