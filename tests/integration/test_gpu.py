"""What only a CUDA device can show; skipped where there is none."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from gamma_po import attention
from gamma_po.attention import Segments
from gamma_po.layouts import LAYOUTS
from gamma_po.losses import build_loss
from gamma_po.margins import MARGINS, build_margin, solve_kl_margins
from gamma_po.scorer import CompletionScorer
from gamma_po.state import state_to_device
from tests.contracts import random_evidence
from tests.runs import fit, steps_of
from tests.tiny import tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("reference", ["cached", "adapters_off", "copy"])
def test_fit_in_bf16_starts_at_ln_2_and_learns(
    reference: str, tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options = ["--trainer.accelerator", "gpu", "--trainer.devices", "1", "--trainer.precision", "bf16-mixed"]
    options += ["--trainer.max_epochs", "3", "--model.lora.r", "8", "--model.reference", reference]
    losses = steps_of(fit(tiny_model_path, tiny_data, tmp_path, options), "train/loss")
    assert losses[0] == pytest.approx(math.log(2), abs=0.02) and losses[-1] < losses[0]


def test_the_solver_gives_the_same_margins_as_on_the_cpu() -> None:
    h = torch.randn(4096, dtype=torch.float64)
    for gamma0, tau in ((1.0, 1.0), (4.0, 0.1)):
        there = solve_kl_margins(h.cuda(), gamma0=gamma0, tau=tau).cpu()
        torch.testing.assert_close(there, solve_kl_margins(h, gamma0=gamma0, tau=tau), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in MARGINS if name != "column"])
def test_every_margin_works_on_the_device(name: str) -> None:
    options = {"center": True} if name.startswith("kl") else {}
    if name in ("reverse", "shuffled"):
        options = {"inner": build_margin("kl", center=True)}
    margin = build_margin(name, **options).bind(build_loss("dpo"))
    evidence = random_evidence(8)
    h = torch.randn(8, dtype=torch.float64)
    here, _ = margin(h, evidence, margin.fit(evidence.reference))
    there = evidence._replace(
        policy=type(evidence.policy)(*(value.cuda() for value in evidence.policy)),
        reference=type(evidence.policy)(*(value.cuda() for value in evidence.reference)),
    )
    state = state_to_device(margin.fit(there.reference), torch.device("cuda"))
    got, state = margin(h.cuda(), there, state)
    again, _ = margin(h.cuda(), there, state)
    assert again.shape == (8,)
    torch.testing.assert_close(got.cpu(), here, rtol=0, atol=1e-9)


def test_layouts_agree_on_the_device() -> None:
    scorer = CompletionScorer(tiny_model().cuda())
    generator = torch.Generator().manual_seed(1)
    parts = [[torch.randint(3, 300, (n,), generator=generator) for n in (4, 7, 1)] for _ in range(3)]
    values = [scorer.sequence_logps(layout(*parts, 0).to("cuda")) for layout in LAYOUTS.values()]
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=0, atol=1e-3)  # TF32


@pytest.mark.parametrize("window", [None, 5])
def test_all_sequences_of_a_row_in_one_kernel_are_as_one_by_one(window: int | None) -> None:
    groups = ((7, 40, 33), (1, 1, 64), (90, 5, 6))
    segments = Segments.of(groups, "cuda")
    length = sum(map(sum, groups))
    query, key, value = (torch.randn(1, heads, length, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    in_one = attention._in_one_kernel(query, key, value, segments, None, window)
    wide = (tensor.float() for tensor in (query, key, value))
    loop = attention._one_by_one(*wide, segments, None, 0.0, window, None)
    torch.testing.assert_close(in_one.float(), loop[0].transpose(0, 1), rtol=0.02, atol=0.02)
