"""The values that flow through the package; every tensor's shape stands beside its field.

`P` is the number of pairs in a batch, `S = 2P` the number of sequences (all chosen, then all rejected),
`[R, T]` the rows and columns of the model's input, `N` the number of completion tokens in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor


class PairLogps(NamedTuple):
    """Log-probabilities of the completions of P pairs under one model; the last four fields where they are known."""

    chosen: Tensor  # [P] summed over the completion's tokens, nats
    rejected: Tensor  # [P]
    chosen_length: Tensor  # [P] number of completion tokens, >= 1
    rejected_length: Tensor  # [P]
    chosen_shared: Tensor | None = None  # [P] as `chosen`, over the first min(chosen_length, rejected_length) tokens
    rejected_shared: Tensor | None = None  # [P]
    chosen_on_policy: Tensor | None = None  # [P] mean over tokens of log p(y) - log Σ_v p(v)², no graph, nats per token
    rejected_on_policy: Tensor | None = None  # [P]

    @property
    def margin(self) -> Tensor:
        """log π(chosen) - log π(rejected), [P], nats."""
        return self.chosen - self.rejected

    @property
    def mean_chosen(self) -> Tensor:
        """Log-probability per token of the chosen completion, [P], nats per token."""
        return self.chosen / self.chosen_length

    @property
    def mean_rejected(self) -> Tensor:
        """Log-probability per token of the rejected completion, [P], nats per token."""
        return self.rejected / self.rejected_length

    def map(self, function: Callable[[Tensor], Tensor]) -> PairLogps:
        """Apply `function` to every field that is there."""
        return _map_tensors(self, function)

    def detach(self) -> PairLogps:
        """The same values without their graph."""
        return self.map(Tensor.detach)

    @staticmethod
    def joined(parts: Sequence[PairLogps]) -> PairLogps:
        """The pairs of all parts, which have the same fields, in turn."""
        columns = zip(*parts, strict=True)
        return PairLogps._make(None if column[0] is None else torch.cat(column) for column in columns)

    def swapped(self) -> PairLogps:
        """Exchange chosen and rejected."""
        return PairLogps._make(side for pair in zip(self[1::2], self[::2], strict=True) for side in pair)


class Evidence(NamedTuple):
    """All that losses and margins may look at."""

    policy: PairLogps
    reference: PairLogps | None = None
    column: Tensor | None = None  # [P] a per-pair number from the data (e.g. a rating gap)

    def map(self, function: Callable[[Tensor], Tensor]) -> Evidence:
        """Apply `function` to every tensor."""
        return _map_tensors(self, function)


class PairRewards(NamedTuple):
    """Implicit rewards of P pairs, β-scaled."""

    chosen: Tensor  # [P]
    rejected: Tensor  # [P]

    @property
    def margin(self) -> Tensor:
        """Reward margin h = reward_chosen - reward_rejected, [P]."""
        return self.chosen - self.rejected


class LossOutput(NamedTuple):
    """Everything one step computed; detached, except `loss`."""

    loss: Tensor  # [] mean over the batch's pairs; carries the gradient
    per_pair: Tensor  # [P]
    rewards: PairRewards  # [P] each
    target_margin: Tensor  # [P] γ, reward units
    gradient_weight: Tensor  # [P] -∂loss_i/∂reward_chosen_i: how hard pair i pulls
    evidence: Evidence


@dataclass(frozen=True)
class ModelInput:
    """Token rows for the model, and where in them each completion token is predicted.

    Layouts (`gamma_po.layouts`) differ only in how they fill these fields, so whatever comes after the
    model's forward is the same for all of them.
    """

    input_ids: Tensor  # [R, T]
    attention_mask: Tensor | None  # [R, T] 1 where a token is; None where there are groups
    position_ids: Tensor | None  # [R, T]; None where they are the columns
    predict_from: Tensor  # [N] position in the flattened [R * T] whose hidden state predicts the token
    targets: Tensor  # [N] the completion tokens
    sequence: Tensor  # [N] which of the S sequences the token belongs to
    lengths: Tensor  # [S] number of completion tokens of each sequence
    groups: tuple[tuple[int, ...], ...] | None = None  # R = 1: how the row divides; see gamma_po.attention

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Move every tensor to `device`."""
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Copy every tensor to page-locked memory."""
        return _map_tensors(self, Tensor.pin_memory)


class PreferenceBatch:
    """One micro-batch of P preference pairs, ready for the model.

    Not a dataclass, on purpose: Lightning's half precision casts every float tensor inside of those, and the
    reference's log-probabilities must stay float32.
    """

    def __init__(
        self,
        *,
        model_inputs: tuple[ModelInput, ...],
        index: Tensor,
        weight: Tensor,
        flipped: Tensor,
        reference: PairLogps | None = None,
        column: Tensor | None = None,
    ) -> None:
        self.model_inputs = model_inputs  # of one forward, or of several in turn that hold no more than was allowed
        self.index = index  # [P] row of the pair in its dataset
        self.weight = weight  # [P] P / (pairs per micro-batch on average); 0 for padding that keeps ranks in step
        self.flipped = flipped  # [P] True where label noise swapped chosen and rejected
        self.reference = reference  # [P] each, float32, from the reference cache
        self.column = column  # [P] margin column of the data

    @property
    def model_input(self) -> ModelInput:
        """The only forward of a batch that is not cut; `gamma_po.forwards.score` takes any batch."""
        (model_input,) = self.model_inputs
        return model_input

    @property
    def num_pairs(self) -> int:
        """P."""
        return self.weight.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Move every tensor to `device`."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Copy every tensor to page-locked memory."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(**{name: _map_tensors(value, function) for name, value in vars(self).items()})


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply `function` to every tensor inside dataclasses and named tuples."""
    if isinstance(value, Tensor):
        return function(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _map_tensors(getattr(value, f.name), function) for f in dataclasses.fields(value)}
        return type(value)(**fields)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map_tensors(item, function) for item in value))
    if isinstance(value, tuple):
        return tuple(_map_tensors(item, function) for item in value)
    return value
