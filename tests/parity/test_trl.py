"""Parity with TRL 1.16, values and gradients in float64, and where the two differ on purpose.

Needs the extra `parity` (TRL itself); skipped without it.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gamma_po.losses import AOT, DPO, FDPO, LDDPO, SFT, WPO, BCOPair, Loss, PairwiseLoss, WeightedSum, build_loss
from gamma_po.types import Evidence, PairLogps
from tests.contracts import STRICT, random_evidence, with_gradient
from tests.parity import trl_harness as theirs

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.skipif(not trl.__version__.startswith("1.16."), reason=f"TRL {trl.__version__} is not 1.16")
GRADIENT = 1e-10  # relative
FLOAT32 = 1e-6  # relative: where TRL computes in float32


@pytest.fixture(autouse=True)
def _float64_by_default() -> Any:
    """TRL's EXO makes tensors of its options in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def equal_lengths(seed: int = 0) -> Evidence:
    """Evidence in which all completions have the same length."""
    evidence, length = random_evidence(seed=seed), torch.full((6,), 9)
    policy = evidence.policy._replace(chosen_length=length, rejected_length=length)
    return evidence._replace(policy=policy)


def ours_and_gradients(loss: Loss, evidence: Evidence, gamma: float = 0.0) -> tuple[Tensor, ...]:
    """Mean loss, and its gradients in the policy's chosen and rejected log-probabilities."""
    leaf, *leaves = with_gradient(evidence)
    value = loss(leaf, torch.full((len(leaves[0]),), gamma)).mean()
    return value.detach(), *torch.autograd.grad(value, leaves, materialize_grads=True)


def theirs_and_gradients(loss_types: list[str], evidence: Evidence, **options: Any) -> tuple[Tensor, ...]:
    """As `ours_and_gradients`, by TRL."""
    leaf, *leaves = with_gradient(evidence)
    value = theirs.dpo_step_loss(loss_types, leaf, **options)
    return value.detach(), *torch.autograd.grad(value, leaves, materialize_grads=True)


def assert_parity(ours: tuple[Tensor, ...], trl_says: tuple[Tensor, ...]) -> None:
    """Equal values and gradients."""
    torch.testing.assert_close(ours[0], trl_says[0], rtol=STRICT, atol=STRICT)
    for a, b in zip(ours[1:], trl_says[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=GRADIENT, atol=STRICT)


SAME = {  # TRL's name: ours, our options, TRL's options
    "sigmoid": ("dpo", {}, {}),
    "hinge": ("hinge", {}, {}),
    "ipo": ("ipo", {}, {}),
    "exo_pair": ("exo_pair", {"label_smoothing": 0.01}, {"label_smoothing": 0.01}),
    "nca_pair": ("nca_pair", {}, {}),
    "robust": ("robust_dpo", {"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    "bco_pair": ("bco_pair", {}, {}),
    "sppo_hard": ("sppo_hard", {}, {}),
    "aot": ("aot", {"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
    "aot_unpaired": ("aot_unpaired", {"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
    "apo_zero": ("apo_zero", {}, {}),
    "apo_down": ("apo_down", {}, {}),
    "discopop": ("discopop", {"tau": 0.08}, {"discopop_tau": 0.08}),
    "sigmoid_norm": ("dpo_norm", {}, {}),
}


@pytest.mark.parametrize("beta", [0.1, 0.6])
@pytest.mark.parametrize("name", SAME)
def test_equals_trl_in_value_and_gradient(name: str, beta: float) -> None:
    ours, our_options, trl_options = SAME[name]
    for seed in range(3):
        evidence = random_evidence(seed=seed)
        loss = build_loss(ours, beta=beta, **our_options)
        assert_parity(
            ours_and_gradients(loss, evidence), theirs_and_gradients([name], evidence, beta=beta, **trl_options)
        )


def built(name: str, beta: float) -> tuple[Loss, dict[str, Any]]:
    """Our loss of TRL's name, and TRL's options for it."""
    ours, our_options, trl_options = SAME[name]
    return build_loss(ours, beta=beta, **our_options), {"beta": beta, **trl_options}


OF_H_ALONE = [name for name in SAME if isinstance(built(name, 0.1)[0], PairwiseLoss)]


def close_to_its_reference(seed: int, dtype: torch.dtype = torch.float64) -> Evidence:
    """Evidence in which no log-ratio exceeds 8 nats."""
    evidence = random_evidence(seed=seed)
    policy, reference = evidence.policy, evidence.reference
    moved = [ours + 0.2 * (theirs - ours) for ours, theirs in zip(policy[:2], reference[:2], strict=True)]
    evidence = evidence._replace(reference=reference._replace(chosen=moved[0], rejected=moved[1]))
    return evidence.map(lambda field: field.to(dtype) if field.is_floating_point() else field)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence"])
@pytest.mark.parametrize("name", OF_H_ALONE)
def test_divergences_equal_trl_for_every_loss_that_it_allows(name: str, divergence: str) -> None:
    for seed in range(2):
        evidence, (inner, options) = close_to_its_reference(seed), built(name, 0.1)
        ours = ours_and_gradients(FDPO(loss=inner, divergence=divergence), evidence)
        assert_parity(ours, theirs_and_gradients([name], evidence, f_divergence_type=divergence, **options))


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo"])
def test_the_alpha_divergence_equals_trl_to_its_float32_with_one_minus_its_coefficient(name: str, alpha: float) -> None:
    torch.set_default_dtype(torch.float32)
    evidence, (inner, options) = close_to_its_reference(0, torch.float32), built(name, 0.1)
    ours = ours_and_gradients(FDPO(loss=inner, divergence="alpha_divergence", alpha=alpha), evidence)
    trl_says = theirs_and_gradients(
        [name], evidence, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1 - alpha, **options
    )
    for a, b in zip(ours, trl_says, strict=True):
        torch.testing.assert_close(a, b, rtol=20 * FLOAT32, atol=FLOAT32)


@pytest.mark.parametrize("name", [name for name in SAME if not name.startswith("aot") and name != "hinge"])
def test_on_policy_weights_equal_trl(name: str) -> None:
    for seed in range(2):
        evidence, (inner, options) = random_evidence(seed=seed), built(name, 0.1)
        trl_says = theirs_and_gradients([name], evidence, use_weighting=True, **options)
        assert_parity(ours_and_gradients(WPO(loss=inner), evidence), trl_says)


def with_shared(evidence: Evidence) -> Evidence:
    """The shared sums of log-probabilities that grow along the completion as those given to TRL."""

    def of(logps: PairLogps) -> PairLogps:
        sums = []
        for total, length in ((logps.chosen, logps.chosen_length), (logps.rejected, logps.rejected_length)):
            common = torch.minimum(logps.chosen_length, logps.rejected_length)
            sums.append(total * (common * (common + 1)) / (length * (length + 1)))  # Σ_{t <= m} t / Σ_{t <= n} t
        return logps._replace(chosen_shared=sums[0], rejected_shared=sums[1])

    return evidence._replace(policy=of(evidence.policy), reference=of(evidence.reference))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", SAME)
def test_length_desensitization_equals_trl_for_every_loss(name: str, alpha: float) -> None:
    evidence, (inner, options) = random_evidence(), built(name, 0.1)
    leaf, *leaves = with_gradient(evidence)
    value = LDDPO(loss=inner, alpha=alpha)(with_shared(leaf), torch.zeros(6)).mean()
    ours = value.detach(), *torch.autograd.grad(value, leaves)
    assert_parity(ours, theirs_and_gradients([name], evidence, ld_alpha=alpha, **options))


def test_divergences_weights_and_desensitization_together_equal_trl() -> None:
    evidence = close_to_its_reference(1)
    leaf, *leaves = with_gradient(evidence)
    ours = WPO(loss=LDDPO(loss=FDPO(loss=DPO(beta=0.4)), alpha=0.6))(with_shared(leaf), torch.zeros(6)).mean()
    trl_says = theirs_and_gradients(
        ["sigmoid"], evidence, beta=0.4, f_divergence_type="js_divergence", ld_alpha=0.6, use_weighting=True
    )
    assert_parity((ours.detach(), *torch.autograd.grad(ours, leaves)), trl_says)


def test_all_fifteen_loss_types_of_trl_are_compared() -> None:
    with pytest.raises(ValueError, match="Unknown loss type") as error:
        theirs.dpo_step_loss(["no such type"], random_evidence())
    offered = set(str(error.value).split("[")[1].split("]")[0].replace("'", "").split(", "))
    assert len(offered) == 15
    assert offered == {*SAME, "sft"}


def test_weighted_sum_equals_trl_mpo_on_completions_of_equal_length() -> None:
    evidence = equal_lengths()
    mixed = WeightedSum(losses=(DPO(), BCOPair(), SFT()), weights=(0.8, 0.2, 1.0))
    trl_says = theirs_and_gradients(["sigmoid", "bco_pair", "sft"], evidence, loss_weights=[0.8, 0.2, 1.0])
    assert_parity(ours_and_gradients(mixed, evidence), trl_says)


def test_simpo_equals_trl_with_the_margin_in_its_place() -> None:
    leaf, chosen, rejected = with_gradient(random_evidence())
    policy = leaf.policy
    trl_says = theirs.cpo_losses(policy.mean_chosen, policy.mean_rejected, loss_type="simpo", beta=2.0, simpo_gamma=0.9)
    ours = build_loss("simpo", beta=2.0)(leaf, torch.full((6,), 0.9))
    torch.testing.assert_close(ours, trl_says, rtol=STRICT, atol=STRICT)
    for a, b in zip(
        torch.autograd.grad(ours.sum(), (chosen, rejected)),
        torch.autograd.grad(trl_says.sum(), (chosen, rejected)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=GRADIENT, atol=STRICT)


def test_the_preference_part_of_cpo_equals_trl() -> None:
    leaf, chosen, rejected = with_gradient(random_evidence())
    trl_says = theirs.cpo_losses(chosen, rejected, loss_type="sigmoid", beta=0.3)
    ours = build_loss("cpo", beta=0.3, sft_weight=0.0)(leaf, torch.zeros(6))
    torch.testing.assert_close(ours, trl_says, rtol=STRICT, atol=STRICT)
    for a, b in zip(
        torch.autograd.grad(ours.sum(), (chosen, rejected)),
        torch.autograd.grad(trl_says.sum(), (chosen, rejected)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=GRADIENT, atol=STRICT)


def test_the_odds_ratio_part_of_orpo_equals_trl_to_its_float32() -> None:
    leaf, chosen, rejected = with_gradient(random_evidence())
    policy = leaf.policy
    trl_says = theirs.odds_ratio_losses(policy.mean_chosen, policy.mean_rejected, weight=0.4)
    ours = build_loss("orpo", odds_ratio_weight=0.4)(leaf, torch.zeros(6)) + policy.mean_chosen
    torch.testing.assert_close(ours, trl_says.double(), rtol=FLOAT32, atol=FLOAT32)
    for a, b in zip(
        torch.autograd.grad(ours.sum(), (chosen, rejected)),
        torch.autograd.grad(trl_says.sum(), (chosen, rejected)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=10 * FLOAT32, atol=FLOAT32)


# --- known divergences --------------------------------------------------------------------------------------------


def test_divergence_trl_ignores_label_smoothing_with_sigmoid_where_ours_applies_it() -> None:
    evidence = random_evidence()
    plain, smoothed = (theirs_and_gradients(["sigmoid"], evidence, label_smoothing=e)[0] for e in (0.0, 0.2))
    assert torch.equal(plain, smoothed)
    ours = ours_and_gradients(DPO(label_smoothing=0.2), evidence)[0]
    assert (ours - plain).abs() > 1e-3


def test_divergence_the_likelihood_of_trl_counts_tokens_where_ours_counts_pairs() -> None:
    evidence = random_evidence()
    policy = evidence.policy
    trl_says = theirs_and_gradients(["sft"], evidence)[0]
    ours = ours_and_gradients(SFT(), evidence)[0]
    assert trl_says == pytest.approx((-policy.chosen.sum() / policy.chosen_length.sum()).item(), rel=STRICT)
    assert ours == pytest.approx(
        sum(-c / n for c, n in zip(policy.chosen, policy.chosen_length, strict=True)).item() / 6, rel=STRICT
    )
    assert (ours - trl_says).abs() > 1e-3


def test_the_two_likelihoods_agree_on_completions_of_equal_length() -> None:
    assert_parity(ours_and_gradients(SFT(), equal_lengths()), theirs_and_gradients(["sft"], equal_lengths()))


def toy_forward(name: str) -> tuple[Tensor, Tensor, Tensor, PairLogps, Tensor]:
    """TRL's forward on random logits, and the same log-probabilities by hand: (its three results, ours, all tokens)."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 7, 5, generator=generator)
    ids = torch.randint(0, 5, (4, 7), generator=generator)
    lengths = [4, 2, 3, 1]  # completion tokens; the prompt has two
    for row, length in enumerate(lengths):
        ids[row, 2 + length :] = -1
    token_logps = [
        [math.log(torch.softmax(logits[row, t - 1], dim=0)[ids[row, t]]) for t in range(1, 2 + lengths[row])]
        for row in range(4)
    ]
    sums = torch.tensor([sum(row[1:]) for row in token_logps])
    sizes = torch.tensor(lengths)
    everything = torch.tensor([value for row in token_logps[:2] for value in row])
    results = theirs.forward_nll(name, logits, ids[:2], ids[2:], prompt_length=2)
    return *results, PairLogps(sums[:2], sums[2:], sizes[:2], sizes[2:]), everything


def test_divergence_the_likelihood_of_trl_cpo_is_a_token_mean_over_the_batch() -> None:
    chosen, rejected, nll, by_hand, _ = toy_forward("cpo")
    torch.testing.assert_close(chosen, by_hand.chosen)
    torch.testing.assert_close(rejected, by_hand.rejected)
    torch.testing.assert_close(nll, -by_hand.chosen.sum() / by_hand.chosen_length.sum())
    evidence, none = Evidence(by_hand), torch.zeros(2)
    ours = build_loss("cpo")(evidence, none) - build_loss("cpo", sft_weight=0.0)(evidence, none)
    assert (ours.mean() - nll).abs() > 1e-3


def test_divergence_the_likelihood_of_trl_orpo_is_a_token_mean_and_includes_the_prompt() -> None:
    chosen, rejected, nll, by_hand, everything = toy_forward("orpo")
    torch.testing.assert_close(chosen, by_hand.mean_chosen)
    torch.testing.assert_close(rejected, by_hand.mean_rejected)
    torch.testing.assert_close(nll, -everything.mean())
    assert (-by_hand.mean_chosen.mean() - nll).abs() > 1e-3


def test_divergence_trl_orpo_has_nan_gradients_at_certain_tokens_where_ours_is_finite() -> None:
    """Its log1mexp takes log1p(-exp(x)) in the branch not chosen, which is -inf where exp(x) rounds to 1."""
    mean = torch.tensor([-1e-9, -0.5], dtype=torch.float32, requires_grad=True)
    other = torch.tensor([-0.7, -0.7], dtype=torch.float32)
    (trl_says,) = torch.autograd.grad(theirs.odds_ratio_losses(mean, other, weight=1.0).sum(), mean)
    assert trl_says[0].isnan() and trl_says[1].isfinite()
    one = torch.ones(2, dtype=torch.long)
    policy = PairLogps(mean, other, one, one)
    (ours,) = torch.autograd.grad(build_loss("orpo")(Evidence(policy), torch.zeros_like(other)).sum(), mean)
    assert ours.isfinite().all()


def test_divergence_trl_discopop_overflows_where_ours_is_finite() -> None:
    """Its exp(-x) is infinite and its weight zero for badly ordered pairs: 0 · inf."""
    one, zero = torch.ones(1, dtype=torch.long), torch.zeros(1, dtype=torch.float32)
    wrong = Evidence(PairLogps(zero - 2000, zero - 1, one, one), PairLogps(zero, zero, one, one))
    assert theirs.dpo_step_loss(["discopop"], wrong).isnan()
    assert build_loss("discopop")(wrong, zero).tolist() == pytest.approx([199.9], rel=1e-6)


def test_divergence_trl_has_no_gradient_for_the_weighted_hinge_where_ours_has() -> None:
    """It multiplies the relu's output in place, which the backward pass of the relu still needs."""
    evidence = random_evidence()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        theirs_and_gradients(["hinge"], evidence, use_weighting=True)
    ours = ours_and_gradients(WPO(loss=build_loss("hinge")), evidence)
    torch.testing.assert_close(ours[0], theirs.dpo_step_loss(["hinge"], evidence, use_weighting=True))
    assert ours[1].abs().max() > 0


def test_divergence_trl_overflows_under_the_forward_kl_where_ours_is_finite() -> None:
    """exp(89) is infinite in float32, and a summed log-ratio of -89 nats is nothing unusual."""
    one, zero = torch.ones(1, dtype=torch.long), torch.zeros(1, dtype=torch.float32)
    fallen = Evidence(PairLogps(zero - 200, zero - 1, one, one), PairLogps(zero, zero, one, one))
    assert theirs.dpo_step_loss(["sigmoid"], fallen, f_divergence_type="forward_kl").isinf()
    leaf, *leaves = with_gradient(fallen)
    ours = FDPO(divergence="forward_kl")(leaf, zero)
    gradients = torch.autograd.grad(ours.sum(), leaves)
    assert ours.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0] < 0  # it still pulls up


def test_divergence_trl_stops_pulling_where_it_cuts_the_alpha_divergence_off() -> None:
    torch.set_default_dtype(torch.float32)
    one, zero = torch.ones(1, dtype=torch.long), torch.zeros(1)
    fallen = Evidence(PairLogps(zero - 400, zero - 1, one, one), PairLogps(zero, zero, one, one))
    trl_says = theirs_and_gradients(["sigmoid"], fallen, f_divergence_type="alpha_divergence")
    ours = ours_and_gradients(FDPO(divergence="alpha_divergence", alpha=0.5), fallen)
    assert trl_says[1] == 0 and ours[1] < 0


def kto_pair_and_trl(evidence: Evidence, mismatched: Tensor) -> tuple[Tensor, Tensor]:
    """Our KTOPair, mean per completion, and TRL's KTO with the given log-ratios of mismatched completions."""
    ours = build_loss("kto_pair", beta=0.1)(evidence, torch.zeros(6)).mean() / 2
    return ours, theirs.kto_step_loss(evidence, mismatched, torch.zeros_like(mismatched), beta=0.1)


def test_kto_pair_equals_trl_kto_where_both_estimate_no_kl() -> None:
    evidence = random_evidence()
    below = evidence.policy.chosen + 4, evidence.policy.rejected + 2
    evidence = evidence._replace(reference=evidence.policy._replace(chosen=below[0], rejected=below[1]))
    ours, trl_says = kto_pair_and_trl(evidence, torch.full((12,), -1.0))
    torch.testing.assert_close(ours, trl_says, rtol=STRICT, atol=STRICT)


def test_divergence_trl_kto_estimates_its_kl_from_mismatched_completions() -> None:
    """Ours takes the other side of the pairs: the same number only where the mismatched mean is that mean."""
    evidence = random_evidence()
    ratios = torch.tensor([1.0, 5.0, 3.0, 2.0, 4.0, 3.0]), torch.tensor([9.0, -3.0, 3.0, 1.0, 6.0, 2.0])
    below = evidence.policy._replace(
        chosen=evidence.policy.chosen - ratios[0], rejected=evidence.policy.rejected - ratios[1]
    )
    ours, same_kl = kto_pair_and_trl(evidence._replace(reference=below), torch.full((12,), 3.0))
    torch.testing.assert_close(ours, same_kl, rtol=STRICT, atol=STRICT)
    _, another_kl = kto_pair_and_trl(evidence._replace(reference=below), torch.full((12,), 30.0))
    assert (ours - another_kl).abs() > 1e-3


def test_divergence_our_transport_losses_keep_the_order_of_the_pairs() -> None:
    """TRL's per-sequence losses are in sorted order; ours stand beside their pairs, with the same mean."""
    evidence = random_evidence()
    order = torch.tensor([5, 4, 3, 2, 1, 0])
    flipped = evidence.map(lambda field: field[order])
    torch.testing.assert_close(AOT()(flipped, torch.zeros(6)), AOT()(evidence, torch.zeros(6))[order])
    assert_parity(ours_and_gradients(AOT(), flipped)[:1], theirs_and_gradients(["aot"], evidence)[:1])
