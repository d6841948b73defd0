"""Log-probabilities of given tokens, against full logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gamma_po.logps import Logits, completion_token_logps

TOLERANCE = 1e-5


def full(head: nn.Linear, hidden: Tensor, targets: Tensor, logits: Logits) -> Tensor:
    """log softmax over all logits at once, [N, V]."""
    values = head(hidden) * logits.scale
    values = values if logits.softcap is None else logits.softcap * torch.tanh(values / logits.softcap)
    return torch.log_softmax(values / logits.temperature, dim=1)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("logits", [Logits(), Logits(0.25), Logits(1.0, 3.0), Logits(2.0, 5.0, 0.7)])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_log_probabilities_and_gradients_equal_those_of_full_logits(
    frozen: bool, bias: bool, logits: Logits, chunk: int
) -> None:
    head = nn.Linear(8, 11, bias=bias).double().requires_grad_(not frozen)
    hidden, targets = torch.randn(7, 8, dtype=torch.float64), torch.randint(11, (7,))
    results = []
    for ours in (True, False):
        leaf = hidden.clone().requires_grad_()
        head.zero_grad()
        if ours:
            value = completion_token_logps(leaf, targets, head=head, logits=logits, chunk_tokens=chunk).logps.double()
        else:
            value = full(head, leaf, targets, logits)[torch.arange(7), targets]
        (value * torch.arange(1.0, 8.0)).sum().backward()
        results.append([value.detach(), leaf.grad, *(p.grad for p in head.parameters() if not frozen)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("logits", [Logits(), Logits(0.5, 3.0)])
def test_the_collision_probability_is_the_sum_of_squared_probabilities(frozen: bool, logits: Logits) -> None:
    head = nn.Linear(8, 11).requires_grad_(not frozen)
    hidden, targets = torch.randn(7, 8, requires_grad=True), torch.randint(11, (7,))
    found = completion_token_logps(hidden, targets, head=head, logits=logits, with_collision=True, chunk_tokens=3)
    expected = full(head, hidden, targets, logits).exp().square().sum(1).log()
    torch.testing.assert_close(found.log_collision, expected.detach(), rtol=TOLERANCE, atol=TOLERANCE)
    assert not found.log_collision.requires_grad and found.logps.requires_grad


def test_a_frozen_head_is_not_applied_again_in_the_backward_pass() -> None:
    calls = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(str(function))
            return function(*args, **(kwargs or {}))

    head = nn.Linear(8, 11, bias=False).requires_grad_(False)
    value = completion_token_logps(torch.randn(7, 8, requires_grad=True), torch.randint(11, (7,)), head=head).logps
    with Counting():
        value.sum().backward()
    assert calls and not any("mm" in call for call in calls)


@pytest.mark.parametrize("frozen", [True, False])
def test_log_probabilities_are_float32_under_bfloat16_autocast(frozen: bool) -> None:
    head = nn.Linear(8, 11, bias=False).requires_grad_(not frozen)
    hidden = torch.randn(3, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        value = completion_token_logps(hidden, torch.tensor([1, 2, 3]), head=head).logps
    value.sum().backward()
    assert value.dtype == hidden.grad.dtype == torch.float32


def test_gradients_survive_targets_of_almost_no_probability() -> None:
    head = nn.Linear(2, 3, bias=False).requires_grad_(False)
    head.weight.copy_(torch.tensor([[200.0, 0.0], [-200.0, 0.0], [0.0, 1.0]]))
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    value = completion_token_logps(hidden, torch.tensor([1]), head=head).logps
    value.backward()
    assert value.item() == -400.0 and hidden.grad.tolist() == [[-400.0, 0.0]]
