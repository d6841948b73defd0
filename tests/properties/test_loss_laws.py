"""Laws of the losses in the target margin γ, for any evidence."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gamma_po.losses import DPO, LOSSES, SFT, Loss, PairwiseLoss, TwoSidedLoss, WithSFT, build_loss, gradient_weight
from gamma_po.types import Evidence, PairLogps

ROUNDING = 1e-9  # relative to the size of loss and rewards
OPTIONS = {"with_sft": {"loss": DPO(beta=0.3)}}
ALL = {name: build_loss(name, **OPTIONS.get(name, {})) for name in LOSSES}
OF_H_ALONE = {name: loss for name, loss in ALL.items() if isinstance(loss, PairwiseLoss)}
TWO_SIDED = {name: loss for name, loss in ALL.items() if isinstance(loss, TwoSidedLoss)}
NON_DECREASING = (
    "dpo", "robust_dpo", "simpo", "dpo_norm", "hinge", "kto_pair", "cpo", "orpo", "rdpo", "dpop", "apo_zero",
    "bco_pair", "with_sft", "f_dpo", "ld_dpo", "wpo", "beta_dpo",
)  # fmt: skip
law = settings(deadline=None, max_examples=40)


@st.composite
def evidences(draw: st.DrawFn, reach: float = 60.0) -> Evidence:
    """One to eight pairs with log-probabilities down to -reach and lengths up to 50."""
    count = draw(st.integers(1, 8))

    def logps() -> Tensor:
        values = st.lists(st.floats(-reach, -1e-3), min_size=count, max_size=count)
        return torch.tensor(draw(values), dtype=torch.float64)

    def of_model() -> PairLogps:
        chosen, rejected, shares = logps(), logps(), (draw(st.floats(0, 1)), draw(st.floats(0, 1)))
        on_policy = draw(st.floats(-3, 1)) + 0 * chosen
        return PairLogps(chosen, rejected, *sizes, shares[0] * chosen, shares[1] * rejected, on_policy, on_policy)

    lengths = st.lists(st.integers(1, 50), min_size=count, max_size=count).map(torch.tensor)
    sizes = draw(lengths), draw(lengths)
    return Evidence(of_model(), of_model())


@st.composite
def with_margins(draw: st.DrawFn) -> tuple[Evidence, Tensor]:
    """Evidence and a target margin for each pair."""
    evidence = draw(evidences())
    count = len(evidence.policy.chosen)
    margins = draw(st.lists(st.floats(-5, 20), min_size=count, max_size=count))
    return evidence, torch.tensor(margins, dtype=torch.float64)


def add_to_rejected_reward(loss: Loss, evidence: Evidence, amount: Tensor) -> Evidence:
    """The evidence after adding to the rejected reward, which is linear in the rejected log-probability."""
    rejected = evidence.policy.rejected.clone().requires_grad_()
    leaf = evidence._replace(policy=evidence.policy._replace(rejected=rejected))
    (slope,) = torch.autograd.grad(loss.rewards(leaf).rejected.sum(), rejected)
    moved = evidence.policy._replace(rejected=(rejected + amount / slope).detach())
    return evidence._replace(policy=moved)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Equal up to rounding, relative to the size."""
    torch.testing.assert_close(ours, theirs, rtol=ROUNDING, atol=ROUNDING)


def test_the_losses_of_h_alone_are_those_the_method_lists() -> None:
    listed = "dpo robust_dpo simpo dpo_norm ipo hinge exo_pair discopop rdpo dpop"
    assert set(OF_H_ALONE) == set(listed.split())


@pytest.mark.parametrize("name", OF_H_ALONE)
def test_a_margin_acts_as_if_the_reward_margin_were_smaller_by_it(name: str) -> None:
    loss = OF_H_ALONE[name]

    @law
    @given(with_margins())
    def check(case: tuple[Evidence, Tensor]) -> None:
        evidence, target_margin = case
        smaller_h = add_to_rejected_reward(loss, evidence, target_margin)
        assert_close(loss(evidence, target_margin), loss(smaller_h, torch.zeros_like(target_margin)))

    check()


@pytest.mark.parametrize("name", [name for name in TWO_SIDED if name != "kto_pair"])
def test_a_margin_takes_half_from_the_chosen_reward_and_gives_half_to_the_rejected(name: str) -> None:
    loss = TWO_SIDED[name]

    @law
    @given(with_margins())
    def check(case: tuple[Evidence, Tensor]) -> None:
        evidence, target_margin = case
        half = target_margin / 2
        moved = add_to_rejected_reward(loss, evidence, half)
        moved = moved._replace(policy=moved.policy._replace(chosen=moved.policy.chosen - half / loss.beta))
        assert_close(loss(evidence, target_margin), loss(moved, torch.zeros_like(target_margin)))

    check()


@pytest.mark.parametrize("name", NON_DECREASING)
def test_a_larger_margin_never_lowers_the_loss(name: str) -> None:
    loss = ALL[name]

    @law
    @given(with_margins(), st.floats(0, 10))
    def check(case: tuple[Evidence, Tensor], more: float) -> None:
        evidence, target_margin = case
        lower, higher = loss(evidence, target_margin), loss(evidence, target_margin + more)
        assert (higher >= lower - ROUNDING * (1 + lower.abs())).all()

    check()


@law
@given(with_margins(), st.floats(0, 10))
def test_a_larger_margin_never_lowers_the_batch_loss_of_optimal_transport(
    case: tuple[Evidence, Tensor], more: float
) -> None:
    evidence, target_margin = case
    for name in ("aot", "aot_unpaired"):
        lower, higher = ALL[name](evidence, target_margin).sum(), ALL[name](evidence, target_margin + more).sum()
        assert higher >= lower - ROUNDING * (1 + lower)


@law
@given(with_margins())
def test_a_likelihood_loss_does_not_read_the_margin(case: tuple[Evidence, Tensor]) -> None:
    evidence, target_margin = case
    assert torch.equal(SFT()(evidence, target_margin), SFT()(evidence, 0 * target_margin))


@law
@given(with_margins())
def test_centred_at_the_pairs_own_reward_margin_dpo_weights_every_pair_one_half(case: tuple[Evidence, Tensor]) -> None:
    evidence, _ = case
    h = DPO().rewards(evidence).margin
    assert_close(gradient_weight(DPO(), evidence, h), torch.full_like(h, 0.5))


@law
@given(with_margins(), st.floats(0.01, 5))
def test_a_likelihood_term_adds_the_same_to_the_weight_whatever_the_margin(
    case: tuple[Evidence, Tensor], weight: float
) -> None:
    evidence, target_margin = case
    extra = gradient_weight(WithSFT(loss=DPO(), sft_weight=weight), evidence, target_margin)
    extra = extra - gradient_weight(DPO(), evidence, target_margin)
    assert_close(extra, weight / (0.1 * evidence.policy.chosen_length.double()))


# --- where the loss turns in γ ------------------------------------------------------------------------------------


def one_pair(chosen_ratio: float, rejected_ratio: float) -> Evidence:
    """One pair with the given log-ratios, one token long."""
    one, zero = torch.ones(1, dtype=torch.long), torch.zeros(1, dtype=torch.float64)
    return Evidence(PairLogps(zero + chosen_ratio, zero + rejected_ratio, one, one), PairLogps(zero, zero, one, one))


def turns_at(loss: Loss, evidence: Evidence, gamma: float, *, minimum: bool = True) -> bool:
    """Whether the loss as a function of γ has a strict minimum (or maximum) at the given γ."""
    here = loss(evidence, torch.tensor([gamma], dtype=torch.float64))
    sign = 1 if minimum else -1
    around = [loss(evidence, torch.tensor([gamma + d], dtype=torch.float64)) for d in (-0.02, -1e-3, 1e-3, 0.02)]
    return all(sign * (value - here) > 0 for value in around)


symmetric = st.floats(-20, 20)
betas = st.floats(0.05, 2)


@law
@given(symmetric, symmetric, betas, st.floats(0.05, 0.45))
def test_smoothed_dpo_and_exo_are_smallest_where_the_margin_leaves_the_log_odds_of_the_label(
    chosen: float, rejected: float, beta: float, smoothing: float
) -> None:
    gamma = beta * (chosen - rejected) - math.log((1 - smoothing) / smoothing)
    for name in ("dpo", "exo_pair"):
        loss = build_loss(name, beta=beta, label_smoothing=smoothing)
        assert turns_at(loss, one_pair(chosen, rejected), gamma)


@law
@given(symmetric, symmetric, betas)
def test_ipo_is_smallest_half_a_reward_unit_and_sppo_one_unit_below_the_reward_margin(
    chosen: float, rejected: float, beta: float
) -> None:
    h = beta * (chosen - rejected)
    assert turns_at(build_loss("ipo", beta=beta), one_pair(chosen, rejected), h - 1 / 2)
    assert turns_at(build_loss("sppo_hard", beta=beta), one_pair(chosen, rejected), h - 1)


@law
@given(symmetric, betas)
def test_nca_is_smallest_two_ln_3_below_the_reward_margin_of_opposite_rewards(ratio: float, beta: float) -> None:
    """With R_l = -R_w the turning condition 3 s(x) - s(-x) = 2 gives s(x) = 3/4."""
    gamma = 2 * beta * ratio - 2 * math.log(3)
    assert turns_at(build_loss("nca_pair", beta=beta), one_pair(ratio, -ratio), gamma)


@law
@given(symmetric, betas)
def test_apo_down_turns_at_the_golden_ratio_for_opposite_rewards(ratio: float, beta: float) -> None:
    """With R_l = -R_w, s'(x) = 2 s'(2x) becomes c² = c + 1 for c = cosh x."""
    loss, h, width = build_loss("apo_down", beta=beta), 2 * beta * ratio, 2 * math.acosh((1 + math.sqrt(5)) / 2)
    assert turns_at(loss, one_pair(ratio, -ratio), h - width, minimum=True)
    assert turns_at(loss, one_pair(ratio, -ratio), h + width, minimum=False)


def test_discopop_turns_twice_near_the_reward_margin() -> None:
    """The excess x = h - γ at which the published formula's derivative vanishes, at its default τ = 0.05."""

    def slope(x: mpmath.mpf) -> mpmath.mpf:
        def f(y: mpmath.mpf) -> mpmath.mpf:
            m = 1 / (1 + mpmath.exp(-y / mpmath.mpf("0.05")))
            return (1 - m) * mpmath.log(1 + mpmath.exp(-y)) + m * mpmath.exp(-y)

        return mpmath.diff(f, x)

    turning = [float(mpmath.findroot(slope, bracket, solver="anderson")) for bracket in ((-0.3, -0.01), (0.01, 0.3))]
    assert turning == pytest.approx((-0.1185699, 0.0720061), abs=1e-5)
    loss, h = build_loss("discopop", beta=0.5), 0.5 * (3.0 - 1.0)
    assert turns_at(loss, one_pair(3.0, 1.0), h - turning[0], minimum=True)
    assert turns_at(loss, one_pair(3.0, 1.0), h - turning[1], minimum=False)
