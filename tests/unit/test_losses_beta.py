"""β-DPO: what β it takes, which pairs it keeps, and what it remembers."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from gamma_po.errors import ConfigError
from gamma_po.losses import DPO, FDPO, IPO, BetaDPO, KTOPair, SimPO, WeightedSum, build_loss, gradient_weight
from gamma_po.losses.dynamic_beta import kept_pairs
from gamma_po.margins import build_margin
from gamma_po.objective import StepState, train
from gamma_po.ranks import Local, Ranks
from gamma_po.state import state_from_plain, state_to_device, state_to_plain
from gamma_po.types import Evidence, PairLogps
from tests import oracle
from tests.contracts import STRICT, LossContract, on_two_ranks, random_evidence, rows_of

NONE = torch.zeros(6, dtype=torch.float64)
FOUR_SIGMA = 4.0


class TestBetaDPO(LossContract):
    """As it is called in evaluation: all pairs, with β."""

    name = "beta_dpo"
    options = ({"loss": DPO(beta=0.2)}, {"loss": DPO(beta=0.1), "alpha": 2.0, "keep": 0.5})
    positive = ("min_beta",)

    def expected(self, evidence: Evidence, target_margin: Tensor, **options: Any) -> Tensor:
        policy, reference = evidence.policy, evidence.reference
        gap = policy.chosen - policy.rejected - reference.chosen + reference.rejected
        return -oracle.log_sigmoid(options["loss"].beta * gap - target_margin.detach())


def gaps(*values: float) -> Evidence:
    """Pairs whose log-ratios differ by the given numbers."""
    chosen, one = torch.tensor(values, dtype=torch.float64), torch.ones(len(values), dtype=torch.long)
    zero = torch.zeros_like(chosen)
    return Evidence(PairLogps(chosen, zero, one, one), PairLogps(zero, zero, one, one))


def test_beta_follows_the_batch_mean_away_from_the_weighted_mean_of_all_batches() -> None:
    """Batch s has weight decay^(t-s): the running mean in closed form, with nothing but batches in it."""
    batches = [(3.0, 1.0), (8.0, 4.0, 0.0), (-2.0,), (5.0, 5.0)]
    loss = BetaDPO(loss=DPO(beta=0.2), alpha=0.1, keep=1.0, decay=0.7)
    state = loss.init()
    for t, batch in enumerate(batches):
        _, state = loss.step(gaps(*batch), state)
        weights = [0.7 ** (t - s) for s in range(t + 1)]
        means = [sum(values) / len(values) for values in batches[: t + 1]]
        running = sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights)
        assert float(state.beta) == pytest.approx(0.2 * (1 + 0.1 * (means[-1] - running)), abs=1e-12)
    assert int(state.steps) == 4


def test_in_the_first_step_beta_is_beta_however_large_the_gaps() -> None:
    """Without bias correction the running mean would be a tenth of the batch's, and β_1 = β (1 + 0.6 · 0.9 · 50)."""
    loss = BetaDPO(keep=1.0)
    _, state = loss.step(gaps(40.0, 60.0), loss.init())
    assert float(state.beta) == pytest.approx(0.1, abs=1e-15)


def test_pairs_left_out_have_no_loss_and_no_gradient_and_the_mean_is_over_the_kept_ones() -> None:
    loss = BetaDPO(loss=DPO(beta=0.2), keep=0.5)
    evidence = random_evidence(8)
    chosen = evidence.policy.chosen.clone().requires_grad_()
    evidence = evidence._replace(policy=evidence.policy._replace(chosen=chosen))
    stepped, state = loss.step(evidence, loss.init())
    gamma = torch.linspace(-1, 1, 8, dtype=torch.float64)
    per_pair = stepped(evidence, gamma)
    per_pair.mean().backward()
    kept = per_pair != 0
    assert int(kept.sum()) == 4
    assert torch.equal(chosen.grad != 0, kept)
    assert torch.equal(gradient_weight(stepped, evidence, gamma) != 0, kept)
    policy, reference = evidence.policy, evidence.reference
    gap = (policy.chosen - policy.rejected - reference.chosen + reference.rejected).detach()
    of_kept = -oracle.log_sigmoid(float(state.beta) * gap[kept] - gamma[kept])
    torch.testing.assert_close(per_pair.mean(), of_kept.mean(), rtol=STRICT, atol=STRICT)
    expected_beta = 0.2 * (1 + 0.6 * float(gap[kept].mean() - gap.mean()))
    assert float(state.beta) == pytest.approx(max(expected_beta, 1e-3), abs=1e-12)


def test_rewards_and_gamma_are_those_of_the_steps_beta() -> None:
    """The margin sees h with β_t, as the loss does: a KL margin over them, then ℓ(h - γ)."""
    loss = BetaDPO(loss=DPO(beta=0.2), alpha=0.3, keep=1.0)
    margin = build_margin("kl", gamma0=1.0, tau=0.5, center=False)
    state = StepState(loss.init(), margin.init())
    _, state = train(loss, margin, gaps(4.0, -1.0), state, Local())
    output, state = train(loss, margin, gaps(10.0, -2.0, 1.0), state, Local())
    h = [float(state.loss.beta) * gap for gap in (10.0, -2.0, 1.0)]
    assert abs(float(state.loss.beta) - 0.2) > 1e-3
    assert output.rewards.margin.tolist() == pytest.approx(h, abs=1e-12)
    pool = [0.2 * 4.0, 0.2 * -1.0, *h]
    assert output.target_margin.tolist() == pytest.approx(oracle.kl_margins(pool, 1.0, 0.5)[2:], abs=1e-9)
    excess = [x - float(gamma) for x, gamma in zip(h, output.target_margin, strict=True)]
    assert output.per_pair.tolist() == pytest.approx([math.log1p(math.exp(-x)) for x in excess], abs=1e-12)


def test_beta_never_falls_below_its_minimum() -> None:
    loss = BetaDPO(alpha=10.0, keep=1.0, min_beta=0.02)
    _, state = loss.step(gaps(50.0), loss.init())
    stepped, state = loss.step(gaps(-50.0), state)
    assert float(state.beta) == 0.02 and stepped.reward_scale == 0.02
    assert float(loss.report(state)["beta"]) == pytest.approx(0.02)


def test_pairs_are_drawn_without_replacement_in_proportion_to_the_gaussian() -> None:
    """Two of three pairs: the chance of each set is the sum over both orders of drawing it."""
    values, mean, std, draws = torch.tensor([0.0, 1.5, -2.0]).double(), 0.3, 1.2, 3000
    density = [math.exp(-(((v - mean) / std) ** 2) / 2) for v in values.tolist()]
    total = sum(density)
    chance = {
        frozenset(pair): sum(
            density[a] / total * density[b] / (total - density[a]) for a, b in itertools.permutations(pair)
        )
        for pair in itertools.combinations(range(3), 2)
    }
    arguments = values, torch.tensor(mean), torch.tensor(std)
    drawn = Counter(
        frozenset(kept_pairs(*arguments, keep=2 / 3, seed=seed).nonzero().flatten().tolist()) for seed in range(draws)
    )
    for pair, probability in chance.items():
        error = math.sqrt(draws * probability * (1 - probability))
        assert abs(drawn[pair] - draws * probability) < FOUR_SIGMA * error


@pytest.mark.parametrize(
    ("keep", "count", "kept"), [(0.8, 10, 8), (0.7, 10, 7), (0.8, 1, 1), (0.01, 6, 1), (1.0, 6, 6)]
)
def test_the_kept_share_is_rounded_to_pairs_and_never_empty(keep: float, count: int, kept: int) -> None:
    values = torch.linspace(-1, 1, count, dtype=torch.float64)
    assert int(kept_pairs(values, values.mean(), torch.tensor(0.5), keep=keep, seed=3).sum()) == kept
    assert int(kept_pairs(0 * values, values.mean(), torch.tensor(0.0), keep=keep, seed=3).sum()) == kept


def test_a_step_is_a_function_of_seed_step_and_pairs_in_whatever_order() -> None:
    loss, evidence, order = BetaDPO(keep=0.5), random_evidence(8), torch.tensor([3, 0, 7, 5, 1, 6, 4, 2])
    before = torch.get_rng_state()
    first, state = loss.step(evidence, loss.init())
    again, _ = loss.step(evidence, loss.init())
    permuted, _ = loss.step(rows_of(evidence, order), loss.init())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.weight, again.weight) and torch.equal(permuted.weight, first.weight[order])
    others = [loss.step(evidence, state._replace(steps=state.steps + k))[0].weight for k in range(8)]
    others += [BetaDPO(keep=0.5, seed=seed).step(evidence, loss.init())[0].weight for seed in range(1, 8)]
    assert len({tuple(weight.tolist()) for weight in others}) > 3


def test_two_ranks_remember_choose_and_weigh_as_one() -> None:
    loss, evidence = BetaDPO(keep=0.5), random_evidence(8)
    pieces = torch.arange(8).split([3, 5])
    whole, state = loss.step(evidence, loss.init())

    def step(ranks: Ranks) -> tuple[Tensor, Any]:
        mine = rows_of(evidence, pieces[ranks.rank])
        stepped, state = loss.step(mine, loss.init(), ranks)
        return stepped(mine, NONE[:1].expand(len(pieces[ranks.rank]))), state

    losses, states = zip(*on_two_ranks(step), strict=True)
    torch.testing.assert_close(torch.cat(losses), whole(evidence, NONE[:1].expand(8)), rtol=STRICT, atol=STRICT)
    for one in states:
        torch.testing.assert_close(state_to_plain(one), state_to_plain(state), rtol=0, atol=0)


def test_state_survives_plain_values_and_another_loss_state_does_not_pass() -> None:
    total = WeightedSum(losses=(BetaDPO(), DPO()), weights=(1.0, 0.5))
    _, state = total.step(random_evidence(), total.init())
    again = state_from_plain(total.init(), state_to_plain(state))
    assert again == state and again == state_to_device(state, torch.device("cpu"))
    assert isinstance(state_to_plain(state), list)
    assert torch.equal(*(total.step(random_evidence(seed=1), part)[0].losses[0].weight for part in (state, again)))
    assert set(total.report(state)) == {"beta_dpo/beta"}
    with pytest.raises(ValueError):
        state_from_plain(total.init(), state_to_plain(state)[:1])
    with pytest.raises(KeyError):
        state_from_plain(BetaDPO().init(), {})


def test_two_terms_of_one_name_report_under_their_index() -> None:
    losses = BetaDPO(loss=DPO(beta=0.2)), DPO(), BetaDPO(loss=DPO(beta=0.4))
    total = WeightedSum(losses=losses, weights=(1.0, 1.0, 1.0))
    report = {name: float(value) for name, value in total.report(total.init()).items()}
    assert report == pytest.approx({"beta_dpo/0/beta": 0.2, "beta_dpo/2/beta": 0.4})


def test_any_loss_of_h_alone_with_a_beta_may_be_given() -> None:
    evidence = random_evidence()
    for inner in (SimPO(beta=2.0), IPO(beta=0.5)):
        loss = BetaDPO(loss=inner, keep=1.0)
        assert loss.needs_reference is inner.needs_reference and loss.centers_kl is inner.centers_kl
        stepped, _ = loss.step(evidence, loss.init())
        assert torch.equal(stepped(evidence, NONE), inner(evidence, NONE))  # β_1 = β


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("loss", KTOPair(), "a loss of h alone with a beta"),
        ("loss", FDPO(), "a loss of h alone with a beta"),
        ("alpha", -0.1, "a number >= 0"),
        ("keep", 0.0, "0 < share <= 1"),
        ("keep", 1.1, "0 < share <= 1"),
        ("decay", 1.0, "0 <= decay < 1"),
    ],
)
def test_options_outside_their_range_are_refused(option: str, value: Any, allowed: str) -> None:
    shown = repr(getattr(value, "name", value))
    with pytest.raises(ConfigError, match=rf"beta_dpo.{option}={shown} is not allowed; allowed: {allowed}"):
        build_loss("beta_dpo", **{option: value})
