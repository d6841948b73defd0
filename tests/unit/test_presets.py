"""Ready-made pairs: the published settings, in reward units."""

from __future__ import annotations

import math

import pytest
import torch

from gamma_po.errors import ConfigError
from gamma_po.losses import DPO, IPO, SimPO, require_margin_fits
from gamma_po.margins import KL, Fixed, NoMargin
from gamma_po.presets import PRESETS, preset
from tests.contracts import random_evidence


@pytest.mark.parametrize(
    ("name", "beta", "gamma0", "tau", "largest_ratio"),
    [
        ("gamma_simpo_llama", 10, 4, 10, 1.49),
        ("gamma_simpo_mistral", 2.5, 0.375, 10, 1.04),
        ("gamma_simpo_gemma", 10, 5, 20, 1.28),
        ("gamma_simpo_qwen", 10, 3, 3, 2.72),
    ],
)
def test_gamma_simpo_has_the_published_settings_in_reward_units(
    name: str, beta: float, gamma0: float, tau: float, largest_ratio: float
) -> None:
    loss, margin, source = preset(name)
    assert loss == SimPO(beta=beta) and "2506.03690" in source
    assert isinstance(margin, KL) and margin.center is False and margin.tau == tau
    assert margin.gamma0 == pytest.approx(gamma0, rel=1e-15)
    # the most that γ can differ between two pairs, reached where one is lost and the other won by far
    gamma, _ = margin(torch.tensor([-900.0, 900.0]).double(), random_evidence(2), margin.init())
    assert float(gamma[1] / gamma[0]) == pytest.approx(largest_ratio, abs=0.005)


def test_gamma_simpo_without_a_model_is_that_of_llama() -> None:
    assert preset("gamma_simpo") is preset("gamma_simpo_llama")


def test_gamma_dpo_is_centred_so_that_it_starts_as_dpo() -> None:
    method, base = preset("gamma_dpo"), preset("dpo")
    evidence = random_evidence()
    untrained = evidence._replace(reference=evidence.policy)
    target_margin, _ = method.margin(torch.zeros(6, dtype=torch.float64), untrained, method.margin.init())
    assert method.loss(untrained, target_margin).tolist() == pytest.approx([math.log(2)] * 6, abs=1e-12)
    none, _ = base.margin(torch.zeros(6, dtype=torch.float64), evidence, base.margin.init())
    assert torch.equal(method.loss(evidence, none), base.loss(evidence, none))


def test_the_baselines_are_dpo_and_ipo_without_a_margin_and_simpo_with_its_fixed_one() -> None:
    assert preset("dpo")[:2] == (DPO(beta=0.1), NoMargin())
    assert preset("ipo")[:2] == (IPO(beta=0.1, length_norm=True), NoMargin())
    loss, margin, _ = preset("simpo")
    assert loss == SimPO(beta=2.5) and margin == Fixed(gamma=1.375)  # β γ/β = 2.5 · 0.55


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_decided_and_runs_as_it_is(name: str) -> None:
    loss, margin, source = preset(name)
    require_margin_fits(loss, margin.name)
    assert margin.bind(loss) == margin and source
    evidence = random_evidence()
    target_margin, _ = margin(loss.rewards(evidence).margin, evidence, margin.init())
    per_pair = loss(evidence, target_margin)
    assert per_pair.shape == (6,) and per_pair.isfinite().all()


def test_an_unknown_preset_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError, match=r"unknown preset 'gamma_kto'; allowed: dpo, gamma_dpo, gamma_simpo, .*simpo"):
        preset("gamma_kto")
