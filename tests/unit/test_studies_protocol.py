"""Comparisons, matched slopes, grids, texts, and the second testbed."""

from __future__ import annotations

import itertools
import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gamma_po.commands.study import main
from gamma_po.errors import ConfigError, DataError
from gamma_po.studies.alpacaeval import AlpacaEval, Answers
from gamma_po.studies.bandit import Bandit
from gamma_po.studies.comparison import Difference, holm, paired, t_quantile, verdict
from gamma_po.studies.methods import METHODS, Axis, at_edges, methods, neighbourhood
from gamma_po.studies.settings import Setting
from gamma_po.studies.slope import Slope, fit_slope, matched
from gamma_po.studies.text_features import text_features
from gamma_po.studies.training import Training
from gamma_po.studies.tuned import Tuned
from gamma_po.studies.worlds import TUNING_SEED

# two-sided 95 % points of Student's t, from printed tables
PRINTED = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 10: 2.228, 29: 2.045, 60: 2.000, 120: 1.980}


@pytest.mark.parametrize("freedom", PRINTED)
def test_t_quantiles_are_those_of_printed_tables(freedom):
    assert t_quantile(0.95, freedom) == pytest.approx(PRINTED[freedom], abs=6e-4)


def test_a_paired_interval_ignores_what_seeds_have_in_common():
    seeds = [0.1, 0.9, 0.4, 0.6]
    difference = paired([s + d for s, d in zip(seeds, [0.01, 0.03, 0.02, 0.02], strict=True)], seeds)
    # mean 0.02, standard deviation sqrt(2/3) / 100, t(3) = 3.182
    assert difference.mean == pytest.approx(0.02)
    assert difference.high - difference.mean == pytest.approx(3.182 * 0.01 * math.sqrt(2 / 3) / 2, rel=1e-3)
    assert paired(seeds, seeds) == Difference(0.0, 0.0, 0.0, 1.0, 4)


def test_two_seeds_that_agree_on_a_share_of_few_prompts_prove_nothing():
    """Shares of 16 prompts, ties half: neighbouring values are 1/32 apart; t(1) = 12.706."""
    by_chance = paired([0.25, 0.5], [0.3125, 0.5625], step=1 / 32)
    assert by_chance.mean == -0.0625
    assert by_chance.high - by_chance.mean == pytest.approx(12.706 / 32 * math.sqrt(1 / 6 / 2), rel=1e-3)
    assert verdict(by_chance, 0.02) == "cannot tell"
    assert paired([0.25, 0.5], [0.25, 0.5], step=1 / 32) == Difference(0.0, 0.0, 0.0, 1.0, 2)


def test_an_interval_covers_the_truth_as_often_as_it_says():
    draws = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    covered = sum(found.low <= 0 <= found.high for found in (paired(row, [0.0] * 5) for row in draws)) / 4000
    assert covered == pytest.approx(0.95, abs=0.0104)  # 3 standard errors


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.01, 0.03, "helps"), (0.001, 0.004, "helps, by less than 0.005"), (-0.03, -0.01, "hurts"),
        (-0.004, 0.004, "equivalent within ±0.005"), (-0.004, 0.006, "cannot tell"), (-0.02, 0.02, "cannot tell"),
    ],
)  # fmt: skip
def test_the_verdict_follows_from_the_interval_alone(low, high, said):
    assert verdict(Difference((low + high) / 2, low, high, 0.5, 9), 0.005) == said


def test_holm_stops_at_the_first_that_fails():
    assert holm([0.06, 0.012, 0.001, 0.02]) == [False, True, True, True]
    assert holm([0.03, 0.04]) == [False, False]


def test_the_slope_of_a_fixed_margin_is_that_margin():
    h = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 2
    slope = fit_slope(h, torch.sigmoid(0.8 - h))
    assert slope == pytest.approx((0.8, 1.0, 1.0), abs=1e-5)
    control = matched(Setting(arm="kl"), Slope(0.5, 0.25, 1.0), "control")
    assert (control.loss.beta, control.margin.gamma, control.arm) == (0.025, 0.5, "control")
    with pytest.raises(ConfigError, match="slope b=-1 is not positive"):
        matched(Setting(arm="kl"), Slope(0.5, -1.0, 1.0), "control")


def test_a_fit_to_pulls_without_a_pattern_explains_nothing():
    generator = torch.Generator().manual_seed(1)
    h, weight = torch.randn(5000, generator=generator), torch.rand(5000, generator=generator)
    assert abs(fit_slope(h, weight).explained) < 0.01


@pytest.mark.parametrize(
    ("a", "b", "spread"), [(9.0, 1.0, 1.0), (0.3, 40.0, 1e-4), (-30.0, 2.0, 5.0), (0.0, -0.5, 2.0)]
)
def test_a_slope_is_found_for_saturated_pulls_tiny_margins_and_pulls_that_rise(a, b, spread):
    h = spread * torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pulls = torch.sigmoid(a - b * h)
    slope = fit_slope(h, pulls)
    assert slope.has_control == (b > 0)
    assert torch.allclose(torch.sigmoid(slope.a - slope.b * h), pulls, atol=1e-4)


def test_a_fit_to_equal_pulls_or_equal_margins_is_finite():
    for slope in (fit_slope(torch.linspace(-1, 1, 9), torch.ones(9)), fit_slope(torch.zeros(9), torch.rand(9))):
        assert math.isfinite(slope.a) and math.isfinite(slope.b)


def test_every_method_has_the_same_budget_and_a_grid_around_usual_values():
    assert {len(method.configurations()) for method in METHODS.values()} == {48}
    for method in METHODS.values():
        for axis in method.axes:
            steps = [math.log(b / a) for a, b in itertools.pairwise(axis.values)]
            assert max(steps) - min(steps) < 0.06, f"{method.name}.{axis.name} is not geometric"
        config = method.configurations()[7]
        setting = method.build("x", 0.2, config)
        assert (setting.loss.beta, setting.learning_rate, setting.flip_rate) == (config[0], config[1], 0.2)


def test_a_grid_grows_where_its_best_lies_on_an_edge_and_nowhere_else():
    (method,) = methods(("dpo",))
    betas, rates = (axis.values for axis in method.axes)
    assert neighbourhood(method, (betas[3], rates[2])) == []
    grown = neighbourhood(method, (betas[0], rates[2]))
    assert [config[0] for config in grown] == pytest.approx([betas[0] / 2] * 3)
    assert {config[1] for config in grown} == set(rates[1:4])
    assert neighbourhood(method, (betas[0] / 2, rates[2]))[0][0] == pytest.approx(betas[0] / 4)
    assert Axis("label_smoothing", (0.1, 0.2, 0.4), 0.5).extended(0.4) is None
    assert at_edges(method, (betas[0], rates[2]), set(method.configurations())) == [f"beta={betas[0]:g}"]
    with pytest.raises(ConfigError, match="method='dop'"):
        methods(("dop",))


def test_tuning_uses_other_seeds_and_picks_the_best_mean():
    testbed = Bandit(prompts=64, held_out=16, responses=6, features=4)
    study = Tuned(
        testbed=testbed, methods=("dpo", "oracle: no flipped pairs"), seeds=(0, 1, 2), tuning_seeds=2, rhos=(0.5,),
        flips=(0.4,), extensions=1, kl=0.2, training=Training(steps=6, batch=32, units=8),
    ).run(workers=1, visible=False)  # fmt: skip
    tuning = [row for row in study.rows if row["stage"] == "tuning"]
    final = [row for row in study.rows if row["stage"] == "evaluation"]
    assert {row["seed"] for row in tuning}.isdisjoint({row["seed"] for row in final})
    assert {row["arm"] for row in final} == {"dpo", "dpo, γ=0", "oracle: no flipped pairs"}
    means = {}
    for row in tuning:
        if row["arm"] == "dpo":
            means.setdefault((row["beta"], row["learning_rate"]), []).append(row["win_rate_kl0.2"])
    best = max(means, key=lambda key: sum(means[key]))
    chosen = next(row for row in study.tuned if row["arm"] == "dpo")
    assert tuple(chosen["options"].values()) == best
    assert chosen["configurations"] == len(means)
    used = {(row["beta"], row["learning_rate"]) for row in final if row["arm"] == "dpo"}
    assert used == {best}


def alpaca_rows(prompts=30, answers=5):
    return [
        {"prompt": f"Question {q}?", "chosen": f"Answer {a} " * (a + 1), "rejected": f"No answer {a}.",
         "score_chosen": float(a), "score_rejected": -1.0 - a}
        for q in range(prompts) for a in range(answers)
    ]  # fmt: skip


def test_answers_are_read_from_pairs_and_from_the_results_folder_alike(tmp_path):
    rows = alpaca_rows()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    for side in ("chosen", "rejected"):
        folder = tmp_path / "results" / side / "weighted_alpaca_eval_gpt4_turbo"
        folder.mkdir(parents=True)
        judged = [
            {"instruction": row["prompt"], "output_2": row[side],
             "preference": 1 + 1 / (1 + math.exp(-row[f"score_{side}"]))}
            for row in rows
        ]  # fmt: skip
        (folder / "annotations.json").write_text(json.dumps(judged))
    from_pairs, from_results = (AlpacaEval.read(str(tmp_path / name)) for name in ("pairs.parquet", "results"))
    assert from_pairs.answers.gold.shape == (30, 10)
    assert torch.allclose(from_pairs.answers.gold.sort().values, from_results.answers.gold.sort().values, atol=1e-5)


def test_held_out_instructions_are_not_trained_on_and_missing_answers_are_never_drawn(tmp_path):
    rows = alpaca_rows()[:-3]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    worlds = AlpacaEval.read(str(tmp_path)).draw((0, 1), (0.75,))
    assert worlds.pairs.first.shape[:2] == (2, 1024)
    assert worlds.held_out.gold.shape == (2, 8, 10)  # 40 % of the 21 that are not for tuning
    assert bool(worlds.pairs.reference_first.isfinite().all() and worlds.pairs.reference_second.isfinite().all())
    assert bool((worlds.pairs.first != worlds.pairs.second).any(-1).all())


def test_tuning_seeds_see_no_instruction_of_the_comparison():
    generator = torch.Generator().manual_seed(5)
    features, gold = (torch.randn(30, 10, *size, generator=generator) for size in ((4,), ()))
    testbed = AlpacaEval(answers=Answers(features, gold, torch.ones(30, 10, dtype=torch.bool)), source="random")

    def answers(seeds):
        worlds = testbed.draw(seeds, (0.5,))
        seen = torch.cat([worlds.pairs.responses.flatten(1, 2), worlds.held_out.features.flatten(1, 2)], dim=1)
        return {tuple(row.tolist()) for row in seen.flatten(0, 1)}

    tuning, compared = answers((TUNING_SEED, TUNING_SEED + 1)), answers((0, 1, 2))
    assert len(tuning) == 9 * 10 and len(compared) == 21 * 10 and not tuning & compared


def test_unusable_answers_are_named(tmp_path):
    pq.write_table(pa.Table.from_pylist(alpaca_rows(prompts=3)), tmp_path / "few.parquet")
    with pytest.raises(DataError, match="3 instructions have 4 or more scored answers"):
        AlpacaEval.read(str(tmp_path / "few.parquet"))
    pq.write_table(pa.table({"prompt": ["a"], "chosen": ["b"]}), tmp_path / "short.parquet")
    with pytest.raises(DataError, match=r"short\.parquet: no column rejected, score_chosen, score_rejected"):
        AlpacaEval.read(str(tmp_path / "short.parquet"))
    with pytest.raises(DataError, match=r"neither Parquet files nor .*annotations\.json"):
        (tmp_path / "empty").mkdir()
        AlpacaEval.read(str(tmp_path / "empty"))


def test_text_features_see_layout_and_words_only():
    plain, listed = text_features("Name a fruit.", "apple pear"), text_features("Name a fruit.", "- apple\n- pear")
    assert plain[12:] == listed[12:] and plain[:12] != listed[:12]
    assert text_features("q", "") == text_features("q", "")
    assert all(math.isfinite(value) for value in text_features("", ""))


def test_wrong_options_are_answered_with_what_is_allowed(tmp_path, capsys):
    assert main([]) == 2
    assert main(["bandit", "--preset", "list", "--output", "x"]) == 0
    assert "plug-and-play" in capsys.readouterr().out
    assert main(["bandit", "--preset", "p3", "--output", str(tmp_path / "a")]) == 2
    assert "preset='p3' is not allowed; allowed: p1, p2" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(["bandit", "--preset", "small", "--output", str(tmp_path / "full")]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
