"""State of losses and margins: through checkpoints and devices, and running moments."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from gamma_po.losses import BetaDPO, WeightedSum
from gamma_po.margins import build_margin
from gamma_po.margins.ablations import ShuffledState
from gamma_po.state import (
    NoState,
    mean_and_std,
    no_moments,
    state_from_plain,
    state_to_device,
    state_to_plain,
    updated,
)


def states() -> list[Any]:
    """Of every shape that there is: nested, in a tuple, empty."""
    nested = build_margin("shuffled", inner=build_margin("kl")).init()
    return [NoState(), nested, BetaDPO().init(), WeightedSum(losses=(BetaDPO(),) * 2, weights=(1.0, 1.0)).init()]


@pytest.mark.parametrize("state", states(), ids=lambda state: type(state).__name__)
def test_states_pass_through_a_file_that_holds_no_code(state: Any) -> None:
    file = io.BytesIO()
    torch.save(state_to_plain(state), file)
    file.seek(0)
    again = state_from_plain(state, torch.load(file, weights_only=True))
    assert type(again) is type(state)
    torch.testing.assert_close(state_to_plain(again), state_to_plain(state), rtol=0, atol=0)


def test_a_state_moves_with_its_dtypes_and_keeps_float64_where_the_device_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moves: list[tuple[torch.dtype, str]] = []
    monkeypatch.setattr(Tensor, "to", lambda self, device: moves.append((self.dtype, device.type)) or self)
    state = ShuffledState(build_margin("kl").init(), torch.zeros((), dtype=torch.int64))
    assert isinstance(state_to_device(state, torch.device("mps")), ShuffledState)
    assert moves == [(torch.int64, "mps")]  # the float64 history stays on the CPU
    state_to_device((state, 3), torch.device("cpu"))
    assert moves[1:] == [(torch.float64, "cpu"), (torch.int64, "cpu")]


def test_what_is_no_tensor_stays_as_it_is() -> None:
    assert state_to_device((1, "a"), torch.device("cpu")) == (1, "a")
    assert state_to_plain((1, "a")) == [1, "a"] and state_from_plain((0, ""), [1, "a"]) == (1, "a")


def test_moments_of_a_steady_stream_are_its_own_from_the_first_batch_on() -> None:
    """Bias correction: whatever the decay, the statistics of equal batches are those of one."""
    moments = no_moments()
    for _ in range(3):
        moments = updated(moments, torch.tensor([1.0, 5.0, 6.0]), 0.9)
        mean, std = mean_and_std(moments)
        assert float(mean) == pytest.approx(4.0) and float(std) == pytest.approx((14 / 3) ** 0.5)


def test_a_decay_of_zero_remembers_the_last_batch_alone() -> None:
    moments = updated(updated(no_moments(), torch.tensor([100.0, 200.0]), 0.0), torch.tensor([1.0, 3.0]), 0.0)
    assert [float(value) for value in mean_and_std(moments)] == pytest.approx([2.0, 1.0])
