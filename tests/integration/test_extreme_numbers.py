"""Very long, very short and impossible completions, and extreme β: no NaN, and what is not finite is named."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

from gamma_po.layouts import LAYOUTS
from gamma_po.logps import Logits, completion_token_logps
from gamma_po.losses import LOSSES, build_loss
from gamma_po.margins import build_margin
from gamma_po.objective import StepState, check_finite, train
from gamma_po.ranks import Local
from gamma_po.scorer import CompletionScorer
from gamma_po.types import Evidence, PairLogps
from tests.contracts import random_evidence, with_gradient
from tests.runs import run, steps_of
from tests.tiny import tiny_model

LONG = 30_000  # tokens
PER_TOKEN = 0.05  # nats, bfloat16 against float64
HALF = 0.005  # of mean losses and reward margins, weights in float16 against float32
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
SMALL |= {"num_key_value_heads": 1, "max_position_embeddings": LONG + 8}
WITH_BETA = [name for name, kind in LOSSES.items() if "beta" in inspect.signature(kind).parameters]


def test_thirty_thousand_tokens_against_one_give_a_finite_float32_loss_and_gradient_in_bfloat16() -> None:
    model = tiny_model(**SMALL).bfloat16()
    tokens = torch.Generator().manual_seed(0)
    parts = [[torch.randint(3, 300, (n,), generator=tokens)] for n in (3, LONG, 1)]
    policy = CompletionScorer(model)(LAYOUTS["packed"](*parts, 0))
    assert policy.chosen.dtype == torch.float32 and policy.chosen_length.tolist() == [LONG]
    with torch.no_grad():
        ids = torch.cat([parts[0][0], parts[1][0]])[None]
        exact = tiny_model(**SMALL).double()(input_ids=ids).logits[0, 2:-1].log_softmax(-1)
    expected = float(exact.gather(1, parts[1][0][:, None]).sum())
    assert abs(float(policy.chosen.detach()) - expected) / LONG < PER_TOKEN
    reference = PairLogps(policy.chosen.detach() * 0.99, policy.rejected.detach() * 0.99, *policy[2:4])
    loss, margin = build_loss("dpo"), build_margin("kl", center=True)
    output, _ = train(loss, margin, Evidence(policy, reference), StepState(loss.init(), margin.init()), Local())
    output.loss.backward()
    assert output.per_pair.dtype == output.target_margin.dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_float16_weights_train_with_float32_rewards_margins_and_losses_near_those_of_float32(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1", "--data.validation", "null"]
    runs = {
        precision: run("fit", tiny_model_path, tiny_data, tmp_path, [*options, "--trainer.precision", precision])
        for precision in ("16-true", "32-true")
    }
    half = runs["16-true"].cli.model
    output, evidence = half.last_output, half.last_output.evidence
    assert {parameter.dtype for parameter in half.policy.parameters()} == {torch.float16}
    numbers = [output.loss, output.per_pair, output.target_margin, *output.rewards]
    numbers += [evidence.policy.chosen, evidence.policy.rejected, evidence.reference.chosen]
    assert all(number.dtype == torch.float32 and number.isfinite().all() for number in numbers)
    for column in ("train/loss", "train/rewards/margins"):
        found, expected = (steps_of(done.trainer_dir, column) for done in runs.values())
        assert len(found) == 8 and found == pytest.approx(expected, abs=HALF)
        assert found != expected and abs(expected[-1] - expected[0]) > 50 * HALF


def test_a_token_that_cannot_be_leaves_the_others_alone_and_is_named_where_it_is_asked_for() -> None:
    head = nn.Linear(8, 16)
    with torch.no_grad():
        head.bias[[2, 5]] = -torch.inf  # a masked vocabulary
    hidden = torch.randn(3, 8, requires_grad=True)
    possible, impossible = torch.tensor([0, 1, 3]), torch.tensor([0, 5, 3])
    logps = completion_token_logps(hidden, possible, head=head, logits=Logits(1.0, None)).logps
    allowed = [i for i in range(16) if i not in (2, 5)]
    exact = (hidden.double() @ head.weight[allowed].double().T + head.bias[allowed].double()).log_softmax(-1)
    places = torch.tensor([[allowed.index(int(i))] for i in possible])
    torch.testing.assert_close(logps.double(), exact.gather(1, places)[:, 0], rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(logps.sum(), [hidden, head.weight])
    assert all(gradient.isfinite().all() for gradient in gradients)
    broken = completion_token_logps(hidden, impossible, head=head, logits=Logits(1.0, None)).logps
    assert broken.isinf().tolist() == [False, True, False]
    with pytest.raises(FloatingPointError, match=r"step 7: .* rows \[41\] of the split. The weights are those of the"):
        check_finite(broken, torch.tensor([40, 41, 42]), 7)


@pytest.mark.parametrize("name", WITH_BETA)
@pytest.mark.parametrize("beta", [1e-6, 1e4])
def test_extreme_betas_give_no_nan(name: str, beta: float) -> None:
    loss = build_loss(name, beta=beta)
    evidence = random_evidence(num_pairs=8).map(lambda value: value.float() if value.is_floating_point() else value)
    leaves, *logps = with_gradient(evidence)
    per_pair = loss(leaves, torch.linspace(0, 2, 8))
    assert per_pair.dtype == torch.float32 and per_pair.isfinite().all()
    gradients = torch.autograd.grad(per_pair.sum(), logps, materialize_grads=True)
    assert all(gradient.isfinite().all() for gradient in gradients)
