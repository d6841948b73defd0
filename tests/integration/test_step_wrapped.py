"""The whole step of losses around a loss, through the model, against token-by-token float64 formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gamma_po.layouts import LAYOUTS
from gamma_po.losses import DPO, FDPO, LDDPO, WPO, Loss
from gamma_po.margins import Fixed
from gamma_po.module import PreferenceModule
from tests import oracle
from tests.contracts import assert_same_step, gradient_vector
from tests.integration.test_step import LORA, our_step, prepared

BETA, GAMMA, ALPHA = 0.3, 0.4, 0.35
LOSSES = {
    "divergence": FDPO(loss=DPO(beta=BETA), divergence="js_divergence"),
    "lengths": LDDPO(loss=DPO(beta=BETA), alpha=ALPHA),
    "weights": WPO(loss=DPO(beta=BETA)),
}


def oracle_step(module: PreferenceModule, examples: list[Any], untouched: nn.Module) -> tuple[Tensor, Tensor]:
    """Loss and gradient, one token at a time."""
    model, losses = oracle.double(module.policy.model), []
    for example in examples:
        scores, weight = [], torch.ones((), dtype=torch.float64)
        shared = min(len(example.chosen), len(example.rejected))
        for completion in (example.chosen, example.rejected):
            tokens, collision = oracle.token_logps(model, example.prompt, completion)
            with torch.no_grad():
                base, _ = oracle.token_logps(untouched, example.prompt, completion)
            match module.loss:
                case FDPO():
                    u = torch.exp((tokens - base).sum())
                    scores.append(torch.log(2 * u / (1 + u)))
                case LDDPO():
                    share = torch.where(torch.arange(len(completion)) < shared, 1.0, ALPHA)
                    scores.append((share * (tokens - base)).sum())
                case WPO():
                    scores.append((tokens - base).sum())
                    weight = weight * torch.exp((tokens - collision).mean()).detach()
        losses.append(-weight * oracle.log_sigmoid(BETA * (scores[0] - scores[1]) - GAMMA))
    value = torch.stack(losses).mean()
    value.backward()
    return value.detach(), gradient_vector([p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("reference", ["cached", "adapters_off"])
def test_loss_and_gradient_equal_the_naive_step(
    reference: str, loss: Loss, layout: str, tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    module, batch, examples, untouched = prepared(
        tiny_model_path, tiny_data["train"], loss, Fixed(gamma=GAMMA), LORA, reference, tmp_path, layout
    )
    assert any(len(example.chosen) != len(example.rejected) for example in examples)
    assert_same_step(our_step(module, batch), oracle_step(module, examples, untouched))
