"""What one of many processes holds that share the weights (FSDP2), by arithmetic: nothing is loaded."""

from __future__ import annotations

from typing import Any

from torch import nn

from gamma_po.inspection.cost import Memory, around_bytes, head_bytes, optimizer_bytes, parameter_bytes
from gamma_po.policies import attach_lora, load_parts
from gamma_po.scorer import CompletionScorer
from gamma_po.sharding import POLICIES, transformer_blocks
from gamma_po.types import PreferenceBatch

NOT_COUNTED = "activations inside of a layer left out"


def without_weights(module: Any) -> CompletionScorer:
    """Return the policy as training would have it, with shapes in place of weights."""
    model = load_parts(module.policy_config)
    return CompletionScorer(model if module.lora is None else attach_lora(model, module.lora, seed=module.seed))


def copy_bytes(module: Any) -> int:
    """Bytes of the reference's whole copy, where the run keeps one in memory."""
    if module.reference is None or module.reference.source != "copy":
        return 0
    return parameter_bytes(load_parts(module.reference.config).parameters())


def gathered_bytes(scorer: nn.Module, precision: str) -> int:
    """Bytes of the others' weights that a process holds at one time: two blocks, embedding and head.

    One block computes while the next arrives; what is in no block stays for the whole forward pass.

    Args:
        scorer: of the policy, sharded or not.
        precision: the trainer's, in which weights are gathered.
    """
    gathered_in = POLICIES[precision].param_dtype if precision in POLICIES else None

    def size(parameters: list[nn.Parameter]) -> int:
        one_each = {id(p): p.numel() * (gathered_in or p.dtype).itemsize for p in parameters}
        return sum(one_each.values())

    blocks = sorted((size(list(block.parameters())) for block in transformer_blocks(scorer.model)), reverse=True)
    return size(list(scorer.parameters())) - sum(blocks[2:])


def computed_memory(module: Any, batch: PreferenceBatch, batch_size: int, precision: str) -> Memory:
    """Return what a step holds if one process has all of it, `NOT_COUNTED` aside.

    Args:
        module: its policy `without_weights`.
        batch: the longest pair, on the device of the run.
        batch_size: pairs per micro-batch.
        precision: the trainer's.
    """
    parameters = list(module.policy.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    config = module.policy.model.config.get_text_config()
    itemsize = (POLICIES[precision].param_dtype or parameters[0].dtype).itemsize
    tokens = batch_size * sum(rows.input_ids.numel() for rows in batch.model_inputs)
    inputs = config.hidden_size * config.num_hidden_layers * itemsize * tokens
    head = head_bytes(batch.model_inputs[0], batch_size, config.vocab_size, itemsize)
    return Memory(
        weights=parameter_bytes(parameters),
        reference=copy_bytes(module),
        gradients=parameter_bytes(trainable),
        optimizer=optimizer_bytes(module.optimizer_factory, trainable),
        activations=inputs,
        head=head,
        around=around_bytes(inputs + head, batch.weight.device),
    )
