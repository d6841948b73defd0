"""What one of many processes holds that share the weights (FSDP2, FSDP1), by arithmetic: nothing is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gamma_po.inspection.cost import (
    Memory,
    Share,
    head_bytes,
    library_bytes,
    optimizer_bytes,
    parameter_bytes,
)
from gamma_po.policies import attach_lora, load_parts
from gamma_po.scorer import CompletionScorer
from gamma_po.sharding import POLICIES, transformer_blocks
from gamma_po.types import PreferenceBatch

NOT_COUNTED = "activations inside of a layer left out"
SUMMED_IN = torch.float32.itemsize  # bytes of a number while gradients are summed over the processes


def without_weights(module: Any) -> CompletionScorer:
    """Return the policy as training would have it, with shapes in place of weights."""
    model = load_parts(module.policy_config)
    return CompletionScorer(model if module.lora is None else attach_lora(model, module.lora, seed=module.seed))


def copy_without_weights(module: Any) -> CompletionScorer | None:
    """Return the reference with shapes in place of weights; None where the run keeps no copy of it in memory."""
    if module.reference is None or module.reference.source != "copy":
        return None
    return CompletionScorer(load_parts(module.reference.config)).requires_grad_(False)


def copy_bytes(copy: nn.Module | None) -> int:
    """Bytes of the reference's whole copy, 0 where there is none."""
    return 0 if copy is None else parameter_bytes(copy.parameters())


def layers(scorer: nn.Module) -> list[list[nn.Parameter]]:
    """Return the parameters that are gathered together: those in no block (embedding, head), then each block's."""
    blocks = [list(block.parameters()) for block in transformer_blocks(scorer.model)]
    inside = {id(parameter) for block in blocks for parameter in block}
    return [[parameter for parameter in scorer.parameters() if id(parameter) not in inside], *blocks]


def at_one_time(sizes: Sequence[int]) -> int:
    """Add up what is gathered at one time: what is in no block, for the whole step, and the two largest blocks.

    One block computes while the next arrives.

    Args:
        sizes: of what is in no block, and of each block.

    >>> at_one_time([5, 1, 3, 2])
    10
    """
    ends, *blocks = sizes
    return ends + sum(sorted(blocks)[-2:])


def undivided_bytes(numbers: Sequence[int], itemsize: int, gathered: int) -> int:
    """Bytes of gradients that are there as a whole, before each process has its part of their sum.

    A block's are there in the precision of the computation, and beside it in float32, in which they are summed. Those
    of what is in no block are complete at the end of the backward pass only, when no weights are gathered any more.

    Args:
        numbers: in the gradient of what is in no block, and of each block.
        itemsize: bytes of a number in the computation.
        gathered: bytes of the weights that are at one time.

    >>> undivided_bytes([10, 100, 300], itemsize=2, gathered=900), undivided_bytes([900, 10], itemsize=2, gathered=1900)
    (1820, 3500)
    """
    ends, *blocks = numbers
    whole = itemsize + SUMMED_IN
    return max(ends * itemsize + max(blocks) * whole, ends * whole - gathered)


def gathered_bytes(scorer: nn.Module, precision: str) -> int:
    """Bytes of the weights that a process holds of all processes at one time.

    Args:
        scorer: of the policy, sharded or not.
        precision: the trainer's, in which weights are gathered.
    """
    return at_one_time([_gathered(layer, precision) for layer in layers(scorer)])


def even_share(policy: nn.Module, copy: nn.Module | None, precision: str, processes: int) -> Share:
    """Return what a process holds under FSDP2, which divides each weight, its gradient and its optimizer state.

    Args:
        policy: its weights may be missing.
        copy: the reference, where it is in memory: its embedding and head stay gathered behind its forward pass.
        precision: the trainer's.
        processes: that share the weights.
    """
    part, gathered = 1 / processes, gathered_bytes(policy, precision)
    trained = [[parameter for parameter in layer if parameter.requires_grad] for layer in layers(policy)]
    itemsize = max(_itemsize(parameter, precision) for layer in trained for parameter in layer)
    ends_of_copy = 0 if copy is None else _gathered(layers(copy)[0], precision)
    return Share(
        processes=processes,
        weights=part,
        reference=part,
        gradients=part,
        optimizer=part,
        gathered=gathered + ends_of_copy,
        undivided=undivided_bytes([sum(p.numel() for p in layer) for layer in trained], itemsize, gathered),
    )


def computed_memory(module: Any, copy: nn.Module | None, batch: PreferenceBatch, batch_size: int) -> Memory:
    """Return what a step holds if one process has all of it, `NOT_COUNTED` aside.

    Args:
        module: its policy `without_weights`.
        copy: of the reference, or None.
        batch: the longest pair, on the device of the run.
        batch_size: pairs per micro-batch.
    """
    parameters = list(module.policy.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    config = module.policy.model.config.get_text_config()
    itemsize = _itemsize(parameters[0], module.trainer.precision)
    tokens = batch_size * sum(rows.input_ids.numel() for rows in batch.model_inputs)
    inputs = config.hidden_size * config.num_hidden_layers * itemsize * tokens
    head = head_bytes(batch.model_inputs[0], batch_size, config.vocab_size, itemsize)
    return Memory(
        weights=parameter_bytes(parameters),
        reference=copy_bytes(copy),
        gradients=parameter_bytes(trainable),
        optimizer=optimizer_bytes(module.optimizer_factory, trainable),
        activations=inputs,
        head=head,
        libraries=library_bytes(batch.weight.device),
    )


def _gathered(layer: Sequence[nn.Parameter], precision: str) -> int:
    """Bytes of a layer's weights in the precision in which they are gathered."""
    return sum(parameter.numel() * _itemsize(parameter, precision) for parameter in layer)


def _itemsize(parameter: nn.Parameter, precision: str) -> int:
    """Bytes of a number of a gathered weight."""
    gathered_in = POLICIES[precision].param_dtype if precision in POLICIES else None
    return (gathered_in or parameter.dtype).itemsize
