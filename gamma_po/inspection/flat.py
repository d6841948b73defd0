"""What one of many processes holds under FSDP1, by arithmetic.

FSDP1 keeps the weights of a transformer block as one flat float32 tensor, and what is in no block as another. Each
process has an n-th of each. Of a flat tensor in which anything trains, the gradient has room for all of it, also for
what is frozen; the optimizer has a state for what trains only, which need not lie evenly in the parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from gamma_po.flat_sharding import FLAT_POLICIES
from gamma_po.inspection.cost import Share
from gamma_po.inspection.sharded import at_one_time, layers, undivided_bytes

ALIGNMENT = 16  # bytes, of the gathered weights: a parameter begins at a multiple


class FlatTensor(NamedTuple):
    """The parameters of a block, or of what is in no block, as one tensor."""

    numel: int
    trained: tuple[tuple[int, int], ...]  # where what trains begins and ends

    @classmethod
    def of(cls, parameters: Sequence[nn.Parameter], *, aligned: int, processes: int) -> FlatTensor:
        """Lay parameters one behind the other.

        Args:
            parameters: in the module's order.
            aligned: each begins at a multiple of so many numbers.
            processes: the length is filled up to a multiple.

        >>> frozen, adapter = nn.Parameter(torch.zeros(5), requires_grad=False), nn.Parameter(torch.zeros(2))
        >>> FlatTensor.of([frozen, adapter], aligned=4, processes=3)
        FlatTensor(numel=12, trained=((8, 10),))
        """
        end, trained = 0, []
        for parameter in parameters:
            begin = -(-end // aligned) * aligned
            end = begin + parameter.numel()
            if parameter.requires_grad:
                trained.append((begin, end))
        return cls(-(-end // processes) * processes, tuple(trained))

    @property
    def in_gradient(self) -> int:
        """Numbers in its gradient."""
        return self.numel if self.trained else 0

    def trained_in_part(self, rank: int, processes: int) -> int:
        """Numbers that train in a process's part.

        >>> [FlatTensor(12, ((3, 5), (8, 10))).trained_in_part(rank, processes=3) for rank in range(3)]
        [1, 1, 2]
        """
        part = self.numel // processes
        first, last = rank * part, (rank + 1) * part
        return sum(max(0, min(end, last) - max(begin, first)) for begin, end in self.trained)


def flat_tensors(scorer: nn.Module, precision: str, processes: int) -> list[FlatTensor]:
    """Return the flat tensors of a model: first of what is in no block, then of each block.

    Args:
        scorer: of the policy or the reference, not sharded; its weights may be missing.
        precision: the trainer's.
        processes: that share the weights.
    """
    aligned = ALIGNMENT // itemsize(precision)
    return [FlatTensor.of(layer, aligned=aligned, processes=processes) for layer in layers(scorer)]


def itemsize(precision: str) -> int:
    """Bytes of a number of a gathered weight."""
    policy = FLAT_POLICIES[precision]
    return (torch.float32 if policy is None else policy.param_dtype).itemsize


def flat_share(policy: nn.Module, copy: nn.Module | None, precision: str, processes: int) -> Share:
    """Return what the process that holds most has under FSDP1.

    Args:
        policy: not sharded; its weights may be missing.
        copy: the reference, where it is in memory: its embedding and head stay gathered behind its forward pass.
        precision: the trainer's.
        processes: that share the weights.
    """
    tensors = flat_tensors(policy, precision, processes)
    of_copy = [] if copy is None else flat_tensors(copy, precision, processes)
    trained = [sum(tensor.trained_in_part(rank, processes) for tensor in tensors) for rank in range(processes)]
    in_gradients = [tensor.in_gradient for tensor in tensors]
    gathered = at_one_time([tensor.numel for tensor in tensors]) * itemsize(precision)
    return Share(
        processes=processes,
        weights=_part(tensors, policy, processes),
        reference=1.0 if copy is None else _part(of_copy, copy, processes),
        gradients=sum(in_gradients) / processes / sum(trained),
        optimizer=max(trained) / sum(trained),
        gathered=gathered + sum(tensor.numel for tensor in of_copy[:1]) * itemsize(precision),
        undivided=undivided_bytes(in_gradients, itemsize(precision), gathered),
    )


def _part(tensors: Sequence[FlatTensor], scorer: nn.Module, processes: int) -> float:
    """A process's numbers over those of the model."""
    return sum(tensor.numel for tensor in tensors) / processes / sum(p.numel() for p in scorer.parameters())
