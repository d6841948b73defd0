"""The whole step of the real module against the naive float64 oracle, at weights perturbed off the reference."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gamma_po.data.dataset import Slot, collate
from gamma_po.data.reference_cache import ReferenceKey, Score, cached_logps
from gamma_po.layouts import LAYOUTS
from gamma_po.losses import DPO, IPO, Loss, SimPO
from gamma_po.margins import KL, Fixed, Margin, NoMargin
from gamma_po.module import PreferenceModule
from gamma_po.policies import Lora, ModelConfig
from gamma_po.ranks import Local
from gamma_po.types import PreferenceBatch
from tests import oracle
from tests.contracts import assert_same_step, batch_of, gradient_vector, oracle_logps, perturb, tiny_dataset

ROWS = range(3, 9)
FLIPS = (4, 7)
LORA = Lora(r=4, alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])


def prepared(
    path: str, source: str, loss: Loss, margin: Margin, lora: Lora | None, reference: str, cache: Path, layout: str
) -> tuple[PreferenceModule, PreferenceBatch, list[Any], torch.nn.Module]:
    """A module off its reference and a batch that carries what it needs; also the untouched float64 model."""
    module = PreferenceModule(ModelConfig(path=path), loss, margin, lora=lora, reference=reference)
    module.configure_model()
    module.train()
    dataset = tiny_dataset(source, flips=FLIPS)
    if reference == "cached" and module.reference is not None:
        dataset.reference = cached_logps(
            dataset.pairs,
            lambda: _scoring(module),
            key=ReferenceKey(module.reference.fingerprint.digest, layout, "float32", "sdpa"),
            folder=cache,
            ranks=Local(),
            batch_size=5,
            collate=partial(collate, pad_id=0, layout=LAYOUTS[layout]),
            description="test",
        ).logps
    untouched = module.policy.model.get_base_model() if lora else module.policy.model
    untouched = oracle.double(copy.deepcopy(untouched))
    perturb(module)
    return module, batch_of(dataset, ROWS, layout), [dataset[Slot(row)] for row in ROWS], untouched


@contextmanager
def _scoring(module: PreferenceModule) -> Iterator[Score]:
    with module.reference.opened(module.policy, policy_is_untouched=True) as scorer, torch.no_grad():
        yield lambda batch: scorer(batch.model_input)


def our_step(module: PreferenceModule, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    """Loss and gradient vector of the product."""
    output, _ = module.compute(batch, module.step_state)
    output.loss.backward()
    parameters = [parameter for parameter in module.policy.model.parameters() if parameter.requires_grad]
    return output.loss.detach(), gradient_vector(parameters)


def oracle_step(module: PreferenceModule, examples: list, untouched: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """The same by the oracle."""
    chosen, rejected, parameters = oracle_logps(module, examples)
    with torch.no_grad():
        base_chosen, base_rejected = oracle.pair_logps(untouched, examples)
    n_w = torch.tensor([float(len(example.chosen)) for example in examples], dtype=torch.float64)
    n_l = torch.tensor([float(len(example.rejected)) for example in examples], dtype=torch.float64)
    loss = module.loss
    match loss:
        case DPO():
            h = loss.beta * ((chosen - base_chosen) - (rejected - base_rejected))
        case SimPO():
            h = loss.beta * (chosen / n_w - rejected / n_l)
        case IPO():
            h = loss.beta * ((chosen - base_chosen) / n_w - (rejected - base_rejected) / n_l)
    match module.margin:
        case NoMargin():
            gamma = torch.zeros(len(h), dtype=torch.float64)
        case Fixed(gamma=value):
            gamma = torch.full((len(h),), value, dtype=torch.float64)
        case KL() as kl:
            gamma = torch.tensor(oracle.kl_margins(h.tolist(), kl.gamma0, kl.tau), dtype=torch.float64)
            gamma = gamma - kl.gamma0 if isinstance(loss, (DPO, IPO)) else gamma
    if isinstance(loss, IPO):
        per_pair = ((h - gamma) / loss.beta - 1 / (2 * loss.beta)) ** 2
    else:
        per_pair = -oracle.log_sigmoid(h - gamma)
    value = per_pair.mean()
    value.backward()
    return value.detach(), gradient_vector(parameters)


CASES = [
    (DPO(beta=0.3), KL(gamma0=1.0, tau=0.5), lora, reference)
    for lora in (None, LORA)
    for reference in ("cached", "copy", "adapters_off")
    if lora is not None or reference != "adapters_off"
] + [
    (loss, margin, lora, "cached")
    for loss in (DPO(beta=0.3), SimPO(beta=2.0), IPO(beta=0.5))
    for margin in (NoMargin(), Fixed(gamma=0.6), KL(gamma0=1.0, tau=0.5))
    for lora in (None, LORA)
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("loss", "margin", "lora", "reference"), CASES)
def test_loss_and_gradient_equal_the_naive_step(
    loss: Loss,
    margin: Margin,
    lora: Lora | None,
    reference: str,
    layout: str,
    tiny_model_path: str,
    tiny_data: dict[str, str],
    tmp_path: Path,
) -> None:
    module, batch, examples, untouched = prepared(
        tiny_model_path, tiny_data["train"], loss, margin, lora, reference, tmp_path, layout
    )
    assert_same_step(our_step(module, batch), oracle_step(module, examples, untouched))


def test_at_the_reference_the_dpo_loss_is_ln_2(tiny_model_path: str, tiny_data: dict, tmp_path: Path) -> None:
    module = PreferenceModule(ModelConfig(path=tiny_model_path), DPO(), KL(tau=0.5), reference="copy")
    module.configure_model()
    output, _ = module.compute(batch_of(tiny_dataset(tiny_data["train"]), ROWS), module.step_state)
    assert float(output.loss.detach()) == pytest.approx(math.log(2), abs=1e-6)


def test_gradient_checkpointing_changes_neither_loss_nor_gradient(
    tiny_model_path: str, tiny_data: dict, tmp_path: Path
) -> None:
    steps = []
    for checkpointing in (False, True, 2):
        module = PreferenceModule(
            ModelConfig(path=tiny_model_path), SimPO(), Fixed(gamma=1.0), gradient_checkpointing=checkpointing
        )
        module.configure_model()
        inner = module.policy.model
        recomputed = [layer.gradient_checkpointing for layer in inner.model.layers]
        assert inner.training and sum(recomputed) == {False: 0, True: 2, 2: 1}[checkpointing]
        steps.append(our_step(module, batch_of(tiny_dataset(tiny_data["train"]), ROWS)))
    for loss, gradient in steps[1:]:
        assert torch.equal(loss, steps[0][0])
        torch.testing.assert_close(gradient, steps[0][1], rtol=1e-6, atol=1e-9)


def test_a_flipped_pair_is_seen_with_chosen_and_rejected_exchanged(tiny_data: dict) -> None:
    clean, noisy = tiny_dataset(tiny_data["train"]), tiny_dataset(tiny_data["train"], flips=FLIPS)
    before, after = batch_of(clean, ROWS), batch_of(noisy, ROWS)
    flipped = torch.tensor([row in FLIPS for row in ROWS])
    assert after.flipped.equal(flipped) and not before.flipped.any()
    lengths_before, lengths_after = before.model_input.lengths.chunk(2), after.model_input.lengths.chunk(2)
    assert lengths_after[0].equal(torch.where(flipped, lengths_before[1], lengths_before[0]))
    assert lengths_after[1].equal(torch.where(flipped, lengths_before[0], lengths_before[1]))
