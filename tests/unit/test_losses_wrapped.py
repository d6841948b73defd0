"""Losses around another loss: other divergences, length desensitization, on-policy weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gamma_po.errors import ConfigError
from gamma_po.losses import (
    AOT,
    DPO,
    DPOP,
    FDPO,
    IPO,
    LDDPO,
    SFT,
    WPO,
    AOTUnpaired,
    BetaDPO,
    DPONorm,
    Hinge,
    KTOPair,
    Loss,
    SimPO,
    WeightedSum,
    WithSFT,
    build_loss,
    gradient_weight,
)
from gamma_po.rewards import divergence_score
from gamma_po.types import Evidence, PairLogps
from tests import oracle
from tests.contracts import STRICT, LossContract, random_evidence

ROUNDING = 2e-7  # of float32 at 1
NONE = torch.zeros(6, dtype=torch.float64)


def near(evidence: Evidence) -> Evidence:
    """The same policy with a reference so near that no ratio of probabilities is far from 1."""
    policy, reference = evidence.policy, evidence.reference
    if reference is None:
        return evidence
    chosen = policy.chosen + 0.02 * (reference.chosen - policy.chosen)
    rejected = policy.rejected + 0.02 * (reference.rejected - policy.rejected)
    return evidence._replace(reference=reference._replace(chosen=chosen, rejected=rejected))


GENERATORS = {  # f of D_f(π ‖ π_ref) = E_ref[f(π/π_ref)], by the definitions of the divergences
    "reverse_kl": lambda u, alpha: u * torch.log(u),
    "forward_kl": lambda u, alpha: -torch.log(u),
    "js_divergence": lambda u, alpha: u * torch.log(2 * u / (u + 1)) + torch.log(2 / (u + 1)),
    "alpha_divergence": lambda u, alpha: (u ** (1 - alpha) - (1 - alpha) * u - alpha) / (alpha * (alpha - 1)),
}


def slope_of_generator(log_ratio: Tensor, divergence: str, alpha: float | None) -> Tensor:
    """f'(u) at u = π/π_ref, up to a constant, by differentiating f."""
    with torch.enable_grad():
        u = torch.exp(log_ratio if log_ratio.requires_grad else log_ratio.clone().requires_grad_())
        (slope,) = torch.autograd.grad(GENERATORS[divergence](u, alpha).sum(), u, create_graph=True)
    return slope if log_ratio.requires_grad else slope.detach()


def ratio_with_score(score: Tensor, divergence: str, alpha: float | None) -> Tensor:
    """log u with f'(u) = score and f'(1) = 0."""
    match divergence:
        case "reverse_kl":
            return score
        case "forward_kl":
            return -torch.log(1 - score)
        case "js_divergence":
            return torch.log(torch.exp(score) / (2 - torch.exp(score)))
    return -torch.log(1 - alpha * score) / alpha


class TestFDPO(LossContract):
    name = "f_dpo"
    options = (
        {"loss": DPO(beta=10.0), "divergence": "reverse_kl"},
        {"loss": DPO(beta=10.0), "divergence": "forward_kl"},
        {"loss": DPO(beta=10.0, label_smoothing=0.1), "divergence": "js_divergence"},
        {"loss": DPO(beta=10.0), "divergence": "alpha_divergence", "alpha": 0.3},
    )
    positive = ()

    def evidence(self, num_pairs: int = 6, seed: int = 0, *, reference: bool = True) -> Evidence:
        return near(random_evidence(num_pairs, seed, reference=reference))

    def expected(self, evidence: Evidence, target_margin: Tensor, **options: Any) -> Tensor:
        policy, reference, inner = evidence.policy, evidence.reference, options["loss"]
        chosen, rejected = (
            slope_of_generator(ours - theirs, options["divergence"], options.get("alpha"))
            for ours, theirs in ((policy.chosen, reference.chosen), (policy.rejected, reference.rejected))
        )
        x = inner.beta * (chosen - rejected) - target_margin.detach()
        smoothing = inner.label_smoothing
        return -(1 - smoothing) * oracle.log_sigmoid(x) - smoothing * oracle.log_sigmoid(-x)

    def moved(self, loss: Loss, evidence: Evidence, chosen: Tensor | float, rejected: Tensor | float) -> Evidence:
        """Rewards are not linear in the log-probabilities: find the ratio that has the moved reward."""
        policy, reference, options = evidence.policy, evidence.reference, (loss.divergence, loss.alpha)
        moved = [
            theirs + ratio_with_score((reward + amount) / loss.loss.beta, *options)
            for theirs, reward, amount in zip(reference[:2], loss.rewards(evidence), (chosen, rejected), strict=True)
        ]
        return evidence._replace(policy=policy._replace(chosen=moved[0], rejected=moved[1]))


class TestLDDPO(LossContract):
    name = "ld_dpo"
    options = (
        {"loss": DPO(beta=0.2), "alpha": 0.3},
        {"loss": DPO(beta=0.1)},
        {"loss": DPO(beta=0.1), "alpha": 0.0},
        {"loss": DPO(beta=0.1), "alpha": 1.0},
    )
    positive = ()

    def expected(self, evidence: Evidence, target_margin: Tensor, **options: Any) -> Tensor:
        policy, reference, alpha = evidence.policy, evidence.reference, options.get("alpha", 0.5)
        sides = []
        for ours, our_shared, theirs, their_shared in (
            (policy.chosen, policy.chosen_shared, reference.chosen, reference.chosen_shared),
            (policy.rejected, policy.rejected_shared, reference.rejected, reference.rejected_shared),
        ):
            sides.append(our_shared - their_shared + alpha * ((ours - our_shared) - (theirs - their_shared)))
        return -oracle.log_sigmoid(options["loss"].beta * (sides[0] - sides[1]) - target_margin.detach())

    def moved(self, loss: Loss, evidence: Evidence, chosen: Tensor | float, rejected: Tensor | float) -> Evidence:
        """Move the shared tokens, which count fully."""
        policy, beta = evidence.policy, loss.loss.beta
        policy = policy._replace(
            chosen=policy.chosen + chosen / beta,
            chosen_shared=policy.chosen_shared + chosen / beta,
            rejected=policy.rejected + rejected / beta,
            rejected_shared=policy.rejected_shared + rejected / beta,
        )
        return evidence._replace(policy=policy)

    def test_a_shared_token_pulls_fully_and_the_rest_by_alpha(self) -> None:
        """In DPO all tokens of a completion have one gradient; here the rest has α times that of the shared ones."""
        policy = random_evidence().policy
        shared, rest = (value.clone().requires_grad_() for value in (policy.chosen_shared, policy.chosen * 0 - 1))
        evidence = random_evidence()._replace(policy=policy._replace(chosen=shared + rest, chosen_shared=shared * 1))
        LDDPO(loss=DPO(beta=0.1), alpha=0.3)(evidence, NONE).sum().backward()
        assert (shared.grad < 0).all()
        torch.testing.assert_close(rest.grad, 0.3 * shared.grad, rtol=STRICT, atol=STRICT)


class TestWPO(LossContract):
    name = "wpo"
    options = ({"loss": DPO(beta=0.2)}, {"loss": DPO(beta=0.1)})
    positive = ()

    def expected(self, evidence: Evidence, target_margin: Tensor, **options: Any) -> Tensor:
        policy, reference = evidence.policy, evidence.reference
        gap = policy.chosen - policy.rejected - reference.chosen + reference.rejected
        weight = torch.exp(policy.chosen_on_policy.detach()) * torch.exp(policy.rejected_on_policy.detach())
        return -weight * oracle.log_sigmoid(options["loss"].beta * gap - target_margin.detach())

    def test_no_gradient_reaches_the_weights(self) -> None:
        evidence = random_evidence()
        leaf = evidence.policy.chosen_on_policy.clone().requires_grad_()
        chosen = evidence.policy.chosen.clone().requires_grad_()
        policy = evidence.policy._replace(chosen=chosen, chosen_on_policy=leaf)
        WPO()(evidence._replace(policy=policy), NONE).sum().backward()
        assert leaf.grad is None and chosen.grad is not None


# --- other divergences --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", GENERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_are_zero_at_equality_and_grow_with_the_ratio(divergence: str, dtype: torch.dtype) -> None:
    alpha = 0.5 if divergence == "alpha_divergence" else None
    ratios = (torch.arange(-150, 151, dtype=dtype) / 10).requires_grad_()
    scores = divergence_score(ratios, divergence, alpha)
    assert scores[150].abs() < ROUNDING and (scores.diff() >= 0).all()
    (slopes,) = torch.autograd.grad(scores.sum(), ratios)
    assert (slopes > 0).all()
    assert slopes[150] == pytest.approx(0.5 if divergence == "js_divergence" else 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("divergence", "alpha"), [("forward_kl", None), ("alpha_divergence", 0.5)])
def test_far_beyond_the_reference_score_and_slope_stay_where_the_dtype_ends(
    divergence: str, alpha: float | None, dtype: torch.dtype
) -> None:
    power = alpha or 1.0
    end = 0.45 * math.log(torch.finfo(dtype).max)
    ratios = torch.tensor([-1e5, -end / power, end / power, 1e5], dtype=dtype, requires_grad=True)
    scores = divergence_score(ratios, divergence, alpha)
    (slopes,) = torch.autograd.grad(scores.sum(), ratios)
    assert scores[0] == scores[1] and scores[2] == scores[3] == 1 / power
    assert slopes.tolist() == pytest.approx([math.exp(end)] * 2 + [math.exp(-end)] * 2, rel=1e-4, abs=0)
    assert scores.square().isfinite().all()


def test_the_alpha_divergence_goes_from_the_reverse_to_the_forward_kl() -> None:
    ratios = torch.linspace(-3, 3, 13, dtype=torch.float64)
    near_reverse, near_forward = (divergence_score(ratios, "alpha_divergence", alpha) for alpha in (1e-9, 1 - 1e-9))
    torch.testing.assert_close(near_reverse, ratios, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(near_forward, divergence_score(ratios, "forward_kl"), rtol=1e-7, atol=1e-7)


def test_the_js_divergence_holds_a_chosen_completion_back_as_soon_as_it_is_likelier_than_under_the_reference() -> None:
    """Its reward is bounded by β log 2, so that no ratio is worth much more than another: the weight dies away."""
    zero, one = torch.zeros(3, dtype=torch.float64), torch.ones(3)
    policy = PairLogps(torch.tensor([-5.0, 0.0, 5.0]).double(), zero, one, one)
    reward = FDPO(loss=DPO(beta=2.0)).rewards(Evidence(policy, PairLogps(zero, zero, one, one))).chosen
    assert reward[1] == 0 and reward[2] < 2 * math.log(2)
    assert reward[0] == pytest.approx(2 * (math.log(2) - 5 - math.log1p(math.exp(-5))), abs=1e-12)


@pytest.mark.parametrize("inner", [DPO(beta=0.3), Hinge(), IPO(), IPO(length_norm=False), DPONorm(), DPOP()])
def test_the_reverse_kl_and_full_weight_of_the_rest_are_the_loss_itself_to_the_bit(inner: Loss) -> None:
    evidence, gamma = random_evidence(), torch.linspace(-1, 1, 6, dtype=torch.float64)
    same = evidence._replace(reference=evidence.reference._replace(chosen=0 * NONE, rejected=0 * NONE))
    assert torch.equal(FDPO(loss=inner, divergence="reverse_kl")(same, gamma), inner(same, gamma))
    assert torch.equal(LDDPO(loss=inner, alpha=1.0)(evidence, gamma), inner(evidence, gamma))


@pytest.mark.parametrize("inner", [IPO(beta=0.5), DPONorm(beta=3.0)])
def test_length_normalised_losses_divide_the_score_by_the_length(inner: Loss) -> None:
    evidence = near(random_evidence())
    policy, reference = evidence.policy, evidence.reference
    chosen = 1 - torch.exp(reference.chosen - policy.chosen)
    rejected = 1 - torch.exp(reference.rejected - policy.rejected)
    expected = inner.beta * chosen / policy.chosen_length, inner.beta * rejected / policy.rejected_length
    ours = FDPO(loss=inner, divergence="forward_kl").rewards(evidence)
    torch.testing.assert_close(ours.chosen, expected[0], rtol=1e-9, atol=STRICT)
    torch.testing.assert_close(ours.rejected, expected[1], rtol=1e-9, atol=STRICT)


# --- length desensitization ---------------------------------------------------------------------------------------


def test_completions_of_equal_length_have_no_rest() -> None:
    evidence = random_evidence()
    policy, reference = (
        logps._replace(chosen_shared=logps.chosen, rejected_shared=logps.rejected) for logps in evidence[:2]
    )
    for alpha in (0.0, 0.4):
        ours = LDDPO(loss=KTOPair(), alpha=alpha)(Evidence(policy, reference), NONE)
        torch.testing.assert_close(ours, KTOPair()(evidence, NONE), rtol=STRICT, atol=STRICT)


def test_divergences_may_stand_inside_of_length_desensitization() -> None:
    """The log-probabilities are weighted first: f' is taken of the weighted ratio."""
    evidence = near(random_evidence())
    both = LDDPO(loss=FDPO(loss=DPO(beta=1.0), divergence="forward_kl"), alpha=0.5).rewards(evidence)
    weighted = LDDPO(loss=DPO(beta=1.0), alpha=0.5).rewards(evidence)
    torch.testing.assert_close(both.chosen, 1 - torch.exp(-weighted.chosen), rtol=1e-9, atol=STRICT)


# --- on-policy weights --------------------------------------------------------------------------------------------


def test_weights_scale_loss_and_pull_alike_and_leave_the_rewards() -> None:
    evidence, gamma = random_evidence(), torch.linspace(-1, 1, 6, dtype=torch.float64)
    policy = evidence.policy._replace(
        chosen_on_policy=NONE + math.log(0.5), rejected_on_policy=torch.linspace(-1, 1, 6, dtype=torch.float64)
    )
    evidence = evidence._replace(policy=policy)
    weight = 0.5 * torch.exp(policy.rejected_on_policy)
    for inner in (SimPO(), KTOPair(), SFT(), WeightedSum()):
        wrapped = WPO(loss=inner)
        torch.testing.assert_close(wrapped(evidence, gamma), weight * inner(evidence, gamma), rtol=STRICT, atol=STRICT)
        assert torch.equal(wrapped.rewards(evidence).margin, inner.rewards(evidence).margin)
        pull = weight * gradient_weight(inner, evidence, gamma)
        torch.testing.assert_close(gradient_weight(wrapped, evidence, gamma), pull, rtol=1e-9, atol=STRICT)


# --- what does not fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("f_dpo", {"loss": SimPO()}, r"f_dpo.loss='simpo' is not allowed; allowed: a loss of h alone with a reference"),
        ("f_dpo", {"loss": KTOPair()}, r"f_dpo.loss='kto_pair'"),
        ("f_dpo", {"loss": LDDPO()}, r"f_dpo.loss='ld_dpo'"),
        ("f_dpo", {"divergence": "kl"}, r"f_dpo.divergence='kl' .*reverse_kl, forward_kl, js_divergence, alpha_diver"),
        ("f_dpo", {"divergence": "alpha_divergence"}, r"f_dpo.alpha=None is not allowed; allowed: 0 < α < 1"),
        ("f_dpo", {"divergence": "alpha_divergence", "alpha": 1.0}, r"f_dpo.alpha=1.0 .*0 < α < 1"),
        ("f_dpo", {"alpha": 0.5}, r"f_dpo.alpha=0.5 .*nothing with divergence=js_divergence"),
        ("ld_dpo", {"alpha": 1.5}, r"ld_dpo.alpha=1.5 is not allowed; allowed: 0 <= α <= 1"),
        ("ld_dpo", {"loss": SimPO()}, r"ld_dpo.loss='simpo'"),
        ("ld_dpo", {"loss": WithSFT(loss=DPO())}, r"ld_dpo.loss='with_sft' .*a loss on log-ratios"),
        ("wpo", {"loss": AOT()}, r"wpo.loss='aot' is not allowed; allowed: a loss that matches no pairs"),
        ("wpo", {"loss": WeightedSum(losses=(DPO(), AOTUnpaired()), weights=(1.0, 1.0))}, r"wpo.loss='weighted_sum'"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_loss(name, **options)


def test_a_loss_says_which_field_it_misses_and_what_that_is() -> None:
    evidence = random_evidence()
    bare = evidence.map(lambda field: field)._replace(policy=PairLogps(*evidence.policy[:4]))
    with pytest.raises(ConfigError) as error:
        WPO()(bare, NONE)
    assert str(error.value) == (
        "the loss 'wpo' needs chosen_on_policy and rejected_on_policy of PairLogps, which are not given: means over "
        "the completion's tokens of log p(token) - log Σ_v p(v)²"
    )
    with pytest.raises(ConfigError, match=r"the loss 'ld_dpo' needs chosen_shared and rejected_shared of PairLogps"):
        LDDPO().rewards(evidence._replace(reference=PairLogps(*evidence.reference[:4])))


def test_what_a_loss_needs_shows_through_everything_around_it() -> None:
    for loss in (LDDPO(), WPO(loss=LDDPO()), WithSFT(loss=WPO(loss=LDDPO()))):
        assert loss.needs_shared and loss.needs_reference and loss.centers_kl and loss.takes_margin
    assert WithSFT(loss=WPO()).needs_on_policy and not LDDPO().needs_on_policy and not DPO().needs_shared
    mixed = WeightedSum(losses=(SimPO(beta=2.5), WPO(loss=LDDPO()), SFT()), weights=(1.0, 1.0, 1.0))
    assert mixed.needs_shared and mixed.needs_on_policy and not mixed.matches_pairs and mixed.reward_scale == 2.5
    assert WithSFT(loss=AOT()).matches_pairs
    assert WPO(loss=FDPO(loss=DPO(beta=0.7))).reward_scale == 0.7 and SFT().reward_scale is None


@pytest.mark.parametrize("around", [WPO, lambda loss: WithSFT(loss=loss), lambda loss: WPO(loss=WithSFT(loss=loss))])
def test_a_loss_around_a_stateful_one_takes_its_steps(around: Any) -> None:
    evidence, inner = random_evidence(), BetaDPO(keep=0.5)
    wrapped = around(loss=inner)
    stepped, state = wrapped.step(evidence, wrapped.init())
    plain, same_state = inner.step(evidence, inner.init())
    assert state == same_state and wrapped.report(state) == inner.report(state)
    assert torch.equal(stepped(evidence, NONE), around(loss=plain)(evidence, NONE))
    assert DPO().step(evidence, ()) == (DPO(), ()) and DPO().report(()) == {}
    assert WPO().step(evidence, ())[0] == WPO()
