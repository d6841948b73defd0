"""Optimizers that cannot train their weights are refused before the first step; others are not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.optim import SGD, Adafactor, AdamW, Optimizer

from gamma_po.errors import ConfigError
from gamma_po.losses import DPO
from gamma_po.margins import KL
from gamma_po.module import PreferenceModule
from gamma_po.optimizers import check_optimizer
from gamma_po.placement import Placement
from gamma_po.policies import Lora, ModelConfig, attach_lora
from gamma_po.scorer import CompletionScorer
from tests.tiny import tiny_model


def weights(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """One weight with a gradient of 1."""
    weight = torch.nn.Parameter(torch.ones(2, dtype=dtype))
    weight.grad = torch.tensor([1.0, 0.0], dtype=dtype)
    return [weight]


class Derived(AdamW):
    """An optimizer of one's own."""


@pytest.mark.parametrize("kind", [AdamW, Derived])
def test_an_eps_that_is_0_in_float16_is_refused_and_would_break_the_weights(kind: type[AdamW]) -> None:
    half = weights(torch.float16)
    with pytest.raises(ConfigError, match=rf"eps=1e-08 is 0 in float16, .*{kind.__name__}.*16-true.*eps: 0.0001"):
        check_optimizer(kind(half), precision="16-true", shared_by=None)
    kind(half).step()
    assert not half[0].isfinite().all()


@pytest.mark.parametrize(
    "optimizer",
    [
        AdamW(weights(torch.float16), eps=1e-4),
        SGD(weights(torch.float16), lr=0.1),
        AdamW(weights(torch.bfloat16)),
        AdamW(weights()),
        Adafactor(weights()),
    ],
)
def test_what_can_be_trained_is_trained(optimizer: Optimizer) -> None:
    check_optimizer(optimizer, precision="16-true", shared_by="ModelParallelStrategy")
    optimizer.step()
    assert all(weight.isfinite().all() for weight in optimizer.param_groups[0]["params"])


def test_float16_weights_are_refused_under_a_loss_scaler_and_adapters_on_them_are_not() -> None:
    with pytest.raises(ConfigError, match=r"dtype=float16 cannot .*16-mixed.*model\.lora"):
        check_optimizer(SGD(weights(torch.float16)), precision="16-mixed", shared_by=None)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with pytest.raises(ValueError, match="unscale FP16 gradients"):  # torch's own words for it
        scaler.unscale_(SGD(weights(torch.float16)))
    model = attach_lora(tiny_model().half(), Lora(r=2), seed=0)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    check_optimizer(AdamW(adapters), precision="16-mixed", shared_by=None)


def test_an_optimizer_of_bitsandbytes_is_refused_where_processes_share_the_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    adam = bitsandbytes.optim.AdamW8bit
    check_optimizer(adam(weights()), precision="32-true", shared_by=None)
    module = PreferenceModule(ModelConfig(path="anything"), DPO(), KL(), reference="copy", optimizer=adam)
    module.policy = CompletionScorer(tiny_model())
    module._trainer = SimpleNamespace(
        strategy=SimpleNamespace(), precision="32-true", accumulate_grad_batches=1, callbacks=[]
    )
    monkeypatch.setattr(Placement, "is_sharded", True)
    with pytest.raises(ConfigError, match=r"optimizer=bitsandbytes\S*\.AdamW8bit does not work with SimpleNamespace.*"):
        module.configure_optimizers()
    check_optimizer(AdamW(weights()), precision="32-true", shared_by="FSDPStrategy")
