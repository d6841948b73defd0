"""What every target margin is: a rule from reward margins (and explicit state) to γ per pair."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from gamma_po.losses.base import Loss
from gamma_po.ranks import Ranks
from gamma_po.types import Evidence, PairLogps


class NoState(NamedTuple):
    """The state of a margin that remembers nothing."""


class Pool(NamedTuple):
    """The pairs among which a margin is allocated, and where this rank's pairs stand in it."""

    score: Tensor  # [M] what γ increases with
    target_margin: Tensor  # [M] γ, reward units
    position: Tensor  # [P] index into the pool


class Margin(ABC):
    """A rule for the target margin γ, in reward units.

    State goes in and comes out; it is a NamedTuple of tensors, equal on every rank, and saved in checkpoints.
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    source: ClassVar[str]
    needs_reference: ClassVar[bool] = False
    needs_fit: ClassVar[bool] = False
    reads_column: ClassVar[bool] = False

    def bind(self, loss: Loss) -> Margin:
        """Return this margin with options left open decided for `loss`."""
        return self

    def init(self) -> Any:
        """Return the state before the first step."""
        return NoState()

    def fit(self, reference: PairLogps) -> Any:
        """Return the state after seeing the reference's log-probabilities of the training split, [N] each."""
        return self.init()

    @abstractmethod
    def __call__(
        self, reward_margin: Tensor, evidence: Evidence, state: Any, ranks: Ranks | None = None
    ) -> tuple[Tensor, Any]:
        """Return γ and the next state.

        Args:
            reward_margin: h, [P], reward units; read without its graph.
            evidence: [P] each.
            state: from `init`, `fit` or the previous call; not changed.
            ranks: the processes of the run; one process if None.

        Returns:
            γ, [P], detached, in the dtype of `reward_margin`; and the next state.
        """


class PoolMargin(Margin):
    """A margin that is allocated over a pool of pairs, so that it can be reversed or shuffled there."""

    @abstractmethod
    def pool(self, reward_margin: Tensor, evidence: Evidence, state: Any, ranks: Ranks) -> tuple[Pool, Any]:
        """Return the pool and the next state."""


def float64(values: Tensor) -> Tensor:
    """Return a detached copy or view in float64, on the CPU where the device (Apple's MPS) has no float64."""
    values = values.detach()
    return (values.cpu() if values.device.type == "mps" else values).double()


def as_target_margin(target_margin: Tensor, reward_margin: Tensor) -> Tensor:
    """Return γ in the dtype and on the device of the reward margin; the dtype first, as MPS has no float64."""
    return target_margin.to(reward_margin.dtype).to(reward_margin.device)


def strength(margin: Any) -> float | None:
    """Return γ0/τ of a KL margin, also of one that another margin reverses or shuffles; None for other margins."""
    margin = getattr(margin, "inner", margin)
    if hasattr(margin, "gamma0") and hasattr(margin, "tau"):
        return margin.gamma0 / margin.tau
    return None


def state_to_plain(state: Any) -> Any:
    """Turn nested NamedTuples into dicts, which `torch.load(weights_only=True)` accepts."""
    if isinstance(state, tuple) and hasattr(state, "_asdict"):
        return {key: state_to_plain(value) for key, value in state._asdict().items()}
    return state


def state_from_plain(template: Any, plain: Any) -> Any:
    """Turn dicts back into the NamedTuples of `template`, e.g. of `margin.init()`."""
    if isinstance(template, tuple) and hasattr(template, "_fields"):
        return type(template)(*(state_from_plain(getattr(template, key), plain[key]) for key in template._fields))
    return plain


def state_to_device(state: Any, device: torch.device) -> Any:
    """Move the tensors of a state; their dtypes stay as they are, and float64 stays where MPS could not hold it."""
    if isinstance(state, Tensor):
        if device.type == "mps" and state.dtype == torch.float64:
            return state.cpu()
        return state.to(device)
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        return type(state)(*(state_to_device(value, device) for value in state))
    return state
