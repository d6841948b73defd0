"""The ablations of the papers' tables as presets: what each compares, and that it runs."""

from __future__ import annotations

import csv
import dataclasses
import re
from pathlib import Path

import pytest

from gamma_po.commands.study import main
from gamma_po.losses import DPO, IPO, KTOPair, SimPO
from gamma_po.margins import KL, Fixed, Map, NoMargin, Reverse, Shuffled
from gamma_po.margins.maps import MapShape
from gamma_po.studies.bandit import Bandit
from gamma_po.studies.plug_and_play import PlugAndPlay
from gamma_po.studies.presets import PRESETS
from gamma_po.studies.study import Study
from gamma_po.studies.training import Training

ROOT = Path(__file__).resolve().parents[2]
TINY = Bandit(prompts=64, held_out=8, responses=5, features=4)
SHORT = Training(steps=4, batch=32, units=8, snapshot_every=2)
ABLATIONS = ("main", "direction", "shapes", "strength", "noise", "reference", "online", "history")
SAME_MEAN = 0.05  # of γ, reward units: a batch's mean is not the training split's


def planned(name: str) -> PlugAndPlay:
    protocol = PRESETS[name][1](TINY)
    assert isinstance(protocol, PlugAndPlay)
    return protocol


def arms(name: str, flips: float = 0.2) -> dict:
    """Loss and margin of every arm."""
    return {a.setting.arm: a.setting for a in planned(name).arms(0.1, 0.01, flips)}


def comparisons(name: str, flips: float = 0.2) -> set[tuple[str, str]]:
    return {(a.setting.arm, other) for a in planned(name).arms(0.1, 0.01, flips) for other in a.against}


@pytest.fixture(scope="module")
def tiny() -> dict[str, Study]:
    def run(name: str) -> Study:
        size = {"seeds": (0, 1), "rhos": (0.5,), "flips": (0.2,), "training": SHORT, "kls": (0.001,), "beta_curve": ()}
        return dataclasses.replace(planned(name), **size).run(workers=1, visible=False)

    return {name: run(name) for name in ABLATIONS}


@pytest.mark.parametrize("name", ABLATIONS)
def test_a_preset_makes_every_comparison_that_it_plans(name: str, tiny: dict[str, Study]) -> None:
    controls = {a.control for a in planned(name).arms(0.1, 0.01, 0.2)}
    made = {(p.arm, p.against) for p in tiny[name].pairings if p.metric == "win_rate"}
    expected = {pair for pair in comparisons(name) if not controls & set(pair)}  # a slope may have no control
    assert expected and expected <= made
    assert tiny[name].passed


def test_main_has_each_base_loss_with_and_without_gamma() -> None:
    found = arms("main")
    for plain, with_gamma, loss in (
        ("dpo", "kl", DPO), ("simpo", "γ-simpo", SimPO), ("ipo", "γ-ipo", IPO), ("kto", "γ-kto", KTOPair),
    ):  # fmt: skip
        assert found[plain].loss == found[with_gamma].loss and isinstance(found[plain].loss, loss)
        assert isinstance(found[with_gamma].margin, KL) and isinstance(found[plain].margin, NoMargin | Fixed)
        assert (with_gamma, plain) in comparisons("main")


def test_direction_has_full_fixed_none_reversed_and_shuffled() -> None:
    found = arms("direction")
    assert isinstance(found["dpo"].margin, NoMargin)
    for full, fixed in (("kl absolute", "fixed γ0"), ("map", "map fixed")):
        inner = found[full].margin
        mean = inner.gamma0 if isinstance(inner, KL) else inner.budget
        assert found[fixed].margin == Fixed(gamma=mean)
        assert found[f"{full} reversed"].margin == Reverse(inner=inner)
        assert found[f"{full} shuffled"].margin == Shuffled(inner=inner)


def test_shapes_has_every_shape_at_the_same_mean() -> None:
    maps = [s.margin for s in arms("shapes").values() if isinstance(s.margin, Map)]
    assert {m.budget for m in maps} == {0.5}
    known = {kind.__name__ for kind in MapShape.__subclasses__()} - {"Quantile"}  # a power of the quantile
    assert {type(m.shape).__name__ for m in maps} == known
    assert "quantile" in {m.standardize for m in maps}


def test_strength_is_a_grid_and_history_a_list() -> None:
    grid = {(s.margin.gamma0, s.margin.tau) for name, s in arms("strength").items() if "τ=" in name}
    assert len(grid) == 25 and len({g for g, _ in grid}) == len({t for _, t in grid}) == 5
    lengths = {s.margin.history for name, s in arms("history").items() if "history=" in name}
    assert lengths == {0, 64, 256, 1024, 4096}


def test_noise_and_reference_vary_what_they_are_named_after_and_nothing_else() -> None:
    noise, reference = planned("noise"), planned("reference")
    assert noise.flips == (0.0, 0.1, 0.2, 0.3, 0.4) and len(noise.rhos) == 1
    assert reference.rhos == (0.0, 0.25, 0.5, 0.75, 0.9) and len(reference.flips) == 1


def test_online_gives_every_margin_the_same_mean_and_pairs_it_with_one_of_its_width(tiny: dict[str, Study]) -> None:
    for row in tiny["online"].rows:
        if row["arm"].startswith(("fixed γ0", "online")):
            assert row["gamma_mean"] == pytest.approx(1.0, abs=SAME_MEAN), row["arm"]
    found = arms("online")
    read = {name.partition(",")[0]: type(s.margin) for name, s in found.items() if ":" in name and "," in name}
    assert read["online"] is KL and read["reference"] is Map
    assert {s.margin.budget for s in found.values() if isinstance(s.margin, Map)} == {1.0}
    for width in ("narrow", "wide"):
        one, other = (next(n for n in found if n.startswith(f"{who}, {width}")) for who in ("reference", "online"))
        assert (one, other) in comparisons("online") and (one, "fixed γ0") in comparisons("online")


def test_online_margins_and_those_of_the_reference_are_about_as_wide_at_20_percent_flips() -> None:
    size = {"testbed": Bandit(held_out=8), "seeds": (0,), "rhos": (0.5,), "flips": (0.2,), "kls": (1.0,)}
    study = dataclasses.replace(planned("online"), **size).run(workers=1, visible=False)
    sd = {row["arm"].partition(":")[0]: row["gamma_sd"] for row in study.rows}
    for width in ("narrow", "wide"):
        assert sd[f"reference, {width}"] == pytest.approx(sd[f"online, {width}"], rel=0.25)
    assert sd["online, wide"] > 2 * sd["online, narrow"]


def test_every_preset_is_listed_and_named_in_the_readme(capsys: pytest.CaptureFixture) -> None:
    assert main(["bandit", "--preset", "list"]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert listed == {*PRESETS, "overhead"}
    readme = (ROOT / "README.md").read_text()
    assert [name for name in listed if f"`{name}`" not in readme] == []


def test_the_readmes_differences_are_those_of_the_studies() -> None:
    """`experiments/studies/readme_table.py` writes both from the folders of the studies."""
    with open(ROOT / "experiments" / "studies" / "readme_table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [f"{row['mean']} [{row['low']}, {row['high']}]{row['holm']}" for row in rows]
    readme = (ROOT / "README.md").read_text()
    table = readme[readme.index("| points of win rate at equal KL") :].split("\n\n")[0]
    assert re.findall(r"[+-]\d+\.\d+ \[[^\]]*\]\*?", table) == expected
    for row in rows:
        assert f"commit {row['commit'][:8]}, {row['comparisons']} comparisons" in table
