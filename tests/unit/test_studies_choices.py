"""Options chosen on held-out pairs, the open challenge, and the look of figures."""

from __future__ import annotations

import math

import pytest
import torch

from gamma_po.errors import ConfigError
from gamma_po.losses import DPO
from gamma_po.margins import Map
from gamma_po.studies import challenge
from gamma_po.studies.bandit import Bandit, RandomFunction
from gamma_po.studies.calibration import Calibrated, choose
from gamma_po.studies.figures import style
from gamma_po.studies.further_pairs import TrainedOn
from gamma_po.studies.linear_average import SEED, UNITS, linear_average
from gamma_po.studies.measures import log_likelihoods
from gamma_po.studies.methods import METHODS
from gamma_po.studies.network import scores
from gamma_po.studies.settings import Setting
from gamma_po.studies.training import Training, train
from gamma_po.studies.worlds import labels, reference_accuracy
from gamma_po.types import Evidence, PairLogps


def test_a_likelier_policy_is_found_with_its_best_temperature():
    generator = torch.Generator().manual_seed(3)
    gap = torch.randn(2000, generator=generator, dtype=torch.float64)
    signed = torch.where(torch.rand(2000, generator=generator) < torch.sigmoid(3 * gap), gap, -gap)
    found = log_likelihoods(torch.stack([signed, 10 * signed, -signed]))
    dense = max(float(torch.nn.functional.logsigmoid(c / 100 * signed).mean()) for c in range(1, 1000))
    assert float(found[0].mean()) == pytest.approx(dense, abs=2e-3)  # the grid of temperatures is coarse
    assert torch.allclose(found[0], found[1], atol=1e-12)  # the scale of the scores does not count
    assert torch.allclose(found[2], torch.full_like(found[2], math.log(0.5)))  # worse than guessing: c = 0


def test_a_strength_is_trusted_only_beyond_two_standard_errors():
    generator = torch.Generator().manual_seed(4)
    base = torch.full((400,), -0.69)
    noise = torch.randn(400, generator=generator) * 0.3
    noise = noise - noise.mean()
    slightly, clearly = base + 0.025 + noise, base + 0.05 + noise  # the standard error is 0.015
    assert choose((0.0, 1.0), torch.stack([base, slightly])).strength == 0
    assert choose((-1.0, 0.0, 1.0), torch.stack([base - 1, base, clearly])).strength == 1
    with pytest.raises(ConfigError, match="0 must be among them"):
        choose((1.0, 2.0), torch.stack([base, base]))


def test_a_map_of_negative_strength_is_the_map_of_a_reference_with_its_answers_swapped():
    reference = PairLogps(torch.randn(50), torch.randn(50), torch.full((50,), 2.0), torch.full((50,), 3.0))
    evidence = Evidence(reference, reference)
    swapped = Evidence(reference.swapped(), reference.swapped())

    def gammas(strength, on):
        margin = Map(budget=0.5, strength=strength)
        return margin(torch.zeros(50), on, margin.fit(on.reference))[0]

    assert torch.allclose(gammas(-1.0, evidence), gammas(1.0, swapped))
    assert torch.allclose(gammas(-3.0, evidence), 3 * gammas(-1.0, evidence))
    assert float(gammas(2.0, evidence).mean()) == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(gammas(0.0, evidence), torch.zeros(50))


def test_a_linear_map_is_dpo_with_a_sharper_reference_and_a_constant_margin():
    drawn = torch.randn(4, 200, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    one = torch.ones(200, dtype=torch.float64)
    policy, reference = PairLogps(drawn[0], drawn[1], one, one), PairLogps(drawn[2], drawn[3], one, one)
    setting = METHODS["linear map"].build("a", 0.0, (0.2, 0.01, 0.3))
    gamma = setting.margin(torch.zeros(200), Evidence(policy, reference), setting.margin.fit(reference))[0]
    m = drawn[2] - drawn[3]
    sigma = float(((m - m.mean()) ** 2).mean().sqrt())
    power = 1 + 0.3 / (0.2 * sigma)
    h = 0.2 * ((drawn[0] - drawn[1]) - power * m)
    expected = torch.log1p((-(h + 0.3 * float(m.mean()) / sigma)).exp())
    assert torch.allclose(setting.loss(Evidence(policy, reference), gamma), expected, atol=1e-6)


def test_calibration_pairs_change_nothing_else_and_are_of_the_same_world():
    plain, more = (Bandit(prompts=64, held_out=8, calibration=count).draw((0, 1), (0.5,)) for count in (0, 4000))
    assert plain.calibration is None
    for one, other in zip((*plain.pairs, *plain.held_out), (*more.pairs, *more.held_out), strict=True):
        assert torch.equal(one, other)
    assert more.calibration.first.shape == (2, 4000, 16)
    assert float(reference_accuracy(more.calibration).mean()) == pytest.approx(0.63, abs=0.06)


def test_calibration_avoids_the_map_at_an_uninformed_reference_and_keeps_it_at_an_informed_one():
    protocol = Calibrated(
        testbed=Bandit(held_out=64, calibration=3000), seeds=(0, 1, 2, 3), rhos=(0.0, 0.75), flips=(0.4,),
        strengths=(-1.0, 0.0, 1.0), kls=(1.0,),
    )  # fmt: skip
    study = protocol.run(workers=1, visible=False)
    rows = {(row["arm"], row["rho"], row["seed"]): row for row in study.rows if row["stage"] == "arms"}
    chosen = {
        rho: [rows["map, calibrated on 300 clean pairs", rho, s]["strength"] for s in range(4)] for rho in (0.0, 0.75)
    }
    assert sum(chosen[0.75]) >= 3 and sum(map(abs, chosen[0.0])) <= 1

    def gain(arm, rho):
        return sum(rows[arm, rho, s]["win_rate_kl1"] - rows["dpo", rho, s]["win_rate_kl1"] for s in range(4)) / 4

    assert gain("map", 0.0) < -0.02 < gain("map, calibrated on 300 clean pairs", 0.0)
    assert gain("map, calibrated on 300 clean pairs", 0.75) > 0.02
    for name in (
        "dpo on the 300 clean pairs alone",
        "dpo on the 300 clean pairs, too",
        "dpo on the 3000 noisy pairs, too",
    ):
        assert gain(name, 0.0) > 0.02 and gain(name, 0.75) > 0.02  # what the map has to beat
    assert not any(name.startswith("calibration_") for row in study.rows for name in row)


def test_pairs_held_out_for_calibration_can_be_trained_on_with_and_without_flips():
    testbed = Bandit(prompts=50, held_out=8, calibration=400)
    plain = testbed.draw((0, 1), (0.5,))
    own, further = plain.pairs, plain.calibration
    alone = TrainedOn(testbed=testbed, own=False, clean=100).draw((0, 1), (0.5,)).pairs
    assert torch.equal(alone.first, further.first[:, :100])
    assert torch.equal(labels(alone, 0.49).first_chosen, further.first_preferred[:, :100])
    beside = TrainedOn(testbed=testbed, noisy=400).draw((0, 1), (0.5,)).pairs
    for name in ("first", "second", "first_preferred", "coin", "responses"):
        assert torch.equal(getattr(beside, name), torch.cat([getattr(own, name), getattr(further, name)], dim=1))
    assert float(labels(beside, 0.4).flipped[:, 50:].double().mean()) == pytest.approx(0.4, abs=0.06)  # of 800 coins
    with pytest.raises(ConfigError, match="calibration=400"):
        TrainedOn(testbed=testbed, clean=401)
    with pytest.raises(ConfigError, match="clean=0, noisy=0"):
        TrainedOn(testbed=testbed)


def test_the_linear_average_is_the_regression_of_gold_rewards_on_noisy_labels():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6 + 2 * 8, 5, generator=generator)
    responses, first, second = x.split([6, 8, 8])
    basis = torch.eye(8)
    found = torch.stack([linear_average(first, second, y, responses, flip_rate=0.2, gap=2.0) for y in basis], dim=1)
    units = RandomFunction(
        responses, UNITS, torch.Generator().manual_seed(SEED)
    )  # the prior's units, gold ~ N(0, Φ Φ')
    terms = torch.tanh(x @ units.weight + units.bias).double()
    root = torch.linalg.cholesky(terms @ terms.T / terms[:6].var(0).sum())
    gold = torch.randn(1_000_000, len(x), generator=generator, dtype=torch.float64) @ root.T
    d = gold[:, 6:14] - gold[:, 14:]
    wins = torch.rand(d.shape, generator=generator) < torch.sigmoid(2 * d)
    flips = torch.rand(d.shape, generator=generator) < 0.2
    y = torch.where(wins ^ flips, 1.0, -1.0).double()
    expected = torch.linalg.lstsq(y, gold[:, :6]).solution.T
    assert float(expected.abs().max()) > 0.1
    # covariances of labels are of first order: 0.01; the regression's standard error: 0.002
    assert torch.allclose(found, expected, atol=0.015)


def test_the_challenge_tunes_what_has_options_and_compares_all():
    protocol = challenge.Challenge(
        testbed=Bandit(prompts=64, held_out=16), seeds=(0, 1), tuning_seeds=1, betas=(0.1, 0.3), learning_rates=(0.01,),
        kls=(0.1,), training=Training(steps=10),
    )  # fmt: skip
    study = protocol.run(workers=1, visible=False)
    names = {contender.name for contender in challenge.CONTENDERS}
    compared = {row["arm"] for row in study.rows if row["stage"] == "evaluation"}
    untuned = {"best linear average, prior known", "oracle, best linear average, prior known"}
    assert compared == names and {row["arm"] for row in study.tuned} == names - untuned
    assert {pairing.arm for pairing in study.pairings} == names - {"dpo"}


def test_the_challenge_trains_as_the_studies_do():
    worlds = Bandit(prompts=96, held_out=4).draw((0,), (0.5,))
    how = Training(steps=10, batch=32)
    setting = Setting(arm="a", loss=DPO(beta=0.3), flip_rate=0.4, learning_rate=0.01)
    expected = train(worlds, [setting], how).network
    target = labels(worlds.pairs, 0.4).first_chosen.float()
    keep = torch.ones(1, 1, 96, dtype=torch.bool)
    job = challenge.Job(worlds, target, keep, torch.tensor([0.3]), torch.tensor([0.01]), 0.4, how)
    found = challenge.train_members(job, challenge.logistic_pull)
    x = torch.randn(1, 50, 17)
    assert torch.allclose(scores(found, x), scores(expected, x), atol=2e-5)  # float32, another order of summation


def test_the_mixture_pulls_by_the_gradient_of_its_likelihood():
    h = torch.linspace(-6, 6, 41, dtype=torch.float64, requires_grad=True)
    for target in (0.0, 1.0):
        p = torch.sigmoid(h) if target else torch.sigmoid(-h)
        loss = -(0.7 * p + 0.3 * (1 - p)).log()
        (expected,) = torch.autograd.grad(loss.sum(), h)
        found = challenge.mixture_pull(h.detach(), torch.full_like(h, target), 0.3)
        assert torch.allclose(found, expected, atol=1e-12)


def test_the_posterior_of_a_label_is_the_share_of_right_labels():
    generator = torch.Generator().manual_seed(6)
    d = 4 * torch.randn(1, 40_000, generator=generator)
    truth = torch.rand(d.shape, generator=generator) < torch.sigmoid(0.5 * d)
    flipped = torch.rand(d.shape, generator=generator) < 0.4
    right = challenge.posterior_right(torch.where(truth ^ flipped, d, -d), 0.4)
    for low, high in ((0.2, 0.4), (0.4, 0.6), (0.6, 0.8)):
        bin_ = (right > low) & (right <= high)
        share = float((~flipped[bin_]).double().mean())
        assert share == pytest.approx(float(right[bin_].mean()), abs=0.03)  # temperatures on a grid, 3 standard errors


def test_no_two_lines_of_a_figure_look_alike():
    for count in (3, 12, 25):
        styles = [style(number, count) for number in range(count)]
        assert len(set(styles)) == count
        assert len({colour for colour, _, _ in styles}) == count
