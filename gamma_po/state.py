"""Explicit state of losses and margins: (named) tuples of tensors, their plain form for checkpoints, moments."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class NoState(NamedTuple):
    """The state of a loss or a margin that remembers nothing."""


def float64(values: Tensor) -> Tensor:
    """Return a detached copy or view in float64, on the CPU where the device (Apple's MPS) has no float64."""
    values = values.detach()
    return (values.cpu() if values.device.type == "mps" else values).double()


def state_to_plain(state: Any) -> Any:
    """Turn nested NamedTuples into dicts and tuples into lists, which `torch.load(weights_only=True)` accepts."""
    if isinstance(state, tuple) and hasattr(state, "_asdict"):
        return {key: state_to_plain(value) for key, value in state._asdict().items()}
    return [state_to_plain(value) for value in state] if isinstance(state, tuple) else state


def state_from_plain(template: Any, plain: Any) -> Any:
    """Turn dicts and lists back into the tuples of `template`, e.g. of `margin.init()`.

    Raises:
        KeyError, TypeError, ValueError: `plain` is the state of something else.
    """
    if isinstance(template, tuple) and hasattr(template, "_fields"):
        return type(template)(*(state_from_plain(getattr(template, key), plain[key]) for key in template._fields))
    if isinstance(template, tuple):
        return tuple(state_from_plain(part, value) for part, value in zip(template, plain, strict=True))
    return plain


def state_to_device(state: Any, device: torch.device) -> Any:
    """Move the tensors of a state; their dtypes stay as they are, and float64 stays where MPS could not hold it."""
    if isinstance(state, Tensor):
        if device.type == "mps" and state.dtype == torch.float64:
            return state.cpu()
        return state.to(device)
    if isinstance(state, tuple):
        moved = [state_to_device(value, device) for value in state]
        return type(state)(*moved) if hasattr(state, "_fields") else tuple(moved)
    return state


class Moments(NamedTuple):
    """Exponentially weighted first and second moment, and the weight they have gathered (for bias correction)."""

    first: Tensor  # [], float64
    second: Tensor  # []
    weight: Tensor  # [] 1 - decay^t


def no_moments() -> Moments:
    """Moments before anything was seen."""
    zero = torch.zeros((), dtype=torch.float64)
    return Moments(zero, zero, zero)


def updated(moments: Moments, values: Tensor, decay: float) -> Moments:
    """Return the moments after a batch of values, [N]."""
    values = float64(values)
    return Moments(
        decay * moments.first + (1 - decay) * values.mean(),
        decay * moments.second + (1 - decay) * values.square().mean(),
        decay * moments.weight + (1 - decay),
    )


def mean_and_std(moments: Moments) -> tuple[Tensor, Tensor]:
    """Bias-corrected mean and standard deviation, [] each.

    Dividing by the gathered weight removes the pull of the zeros that the averages start from; without it a
    +1σ pair reads as many σ in the first steps.

    >>> mean, std = mean_and_std(updated(no_moments(), torch.tensor([1.0, 3.0]), decay=0.9))
    >>> round(float(mean), 6), round(float(std), 6)
    (2.0, 1.0)
    """
    mean = moments.first / moments.weight
    return mean, (moments.second / moments.weight - mean.square()).clamp_min(0).sqrt()
