"""Spread a model's weights over processes in the older way (FSDP1): each transformer block's as one flat tensor.

What FSDP1 needs and FSDP2 does not: all weights of a block in one dtype, wrappers in the model's tree (and so in the
names of its parameters), gradients whose norm no process sees alone, and a gathering of whole blocks to read a weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy

from gamma_po.errors import ConfigError, require
from gamma_po.fused_lora import FusedLoraLinear
from gamma_po.policies import ModelConfig
from gamma_po.ranks import current_ranks
from gamma_po.scorer import CompletionScorer
from gamma_po.sharding import EmptyParameter, empty_parameters, transformer_blocks

WRAPPER = "_fsdp_wrapped_module."  # what FSDP1 puts into the names of parameters
COUNTS = "_counts_before_sharding"  # the attribute of a sharded scorer: parameters that train, and all
# Trainer's precision -> what weights are gathered in (None: as they are) and gradients are summed in. Buffers stay.
FLAT_POLICIES = {
    "32-true": None,
    "bf16-mixed": MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
}


def check_flat_sharding(config: ModelConfig, strategy: Any, precision: str, *, processes: int) -> None:
    """Refuse what cannot be sharded so, and options of the strategy that would be ignored.

    Args:
        config: of the policy or the reference.
        strategy: Lightning's FSDPStrategy.
        precision: the trainer's.
        processes: of the run.

    Raises:
        ConfigError: naming the option and what is allowed.
    """
    if processes == 1:
        raise ConfigError(
            "trainer.strategy: FSDPStrategy has nothing to share in one process; allowed: auto, or several devices"
        )
    require(precision in FLAT_POLICIES, "trainer.precision with FSDPStrategy", precision, ", ".join(FLAT_POLICIES))
    if config.quantization is not None or config.dtype != "float32":
        given = f"dtype={config.dtype}" if config.quantization is None else f"quantization={config.quantization}"
        raise ConfigError(
            f"{given} of a model does not work with FSDPStrategy: it makes one flat tensor of a block's weights, which "
            "has one dtype, and optimizer and adapters need float32; allowed: dtype: float32 without quantization "
            "(computed in bfloat16 with trainer.precision: bf16-mixed), or ModelParallelStrategy"
        )
    options = {
        "sharding_strategy": strategy.sharding_strategy,
        "cpu_offload": strategy.cpu_offload.offload_params,
        "mixed_precision": strategy.mixed_precision,
        "activation_checkpointing_policy": strategy._activation_checkpointing_kwargs or None,
        **strategy.kwargs,
    }
    allowed = {"sharding_strategy": ShardingStrategy.FULL_SHARD, "cpu_offload": False, "use_orig_params": True}
    for name, value in options.items():
        if value != allowed.get(name):
            raise ConfigError(
                f"trainer.strategy: FSDPStrategy with {name}={value} is not supported; allowed: {name}="
                f"{allowed.get(name, 'not set')} (blocks are found from the model; mixed precision is "
                "trainer.precision, recomputation is model.gradient_checkpointing)"
            )


def shard_flat(scorer: CompletionScorer, device: torch.device, precision: str) -> CompletionScorer:
    """Wrap a scorer and its transformer blocks in FSDP1; a process never holds more than its part and one block.

    Embedding, last norm and head belong to the scorer itself, and are gathered for its forward. From here on all
    processes must run equally many forwards, and only through the scorer's own call.

    Args:
        scorer: the same weights on every process, or none yet (`policies.load_parts`); it is changed.
        device: of this process.
        precision: the trainer's.

    Returns:
        The wrapper, to use in its place.

    Raises:
        ConfigError: the architecture does not say what its blocks are.
    """
    parameters = list(scorer.parameters())
    counts = (sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))
    how: dict[str, Any] = {"device_id": device, "mixed_precision": FLAT_POLICIES[precision], "use_orig_params": True}
    places = {id(child): (parent, name) for parent in scorer.modules() for name, child in parent.named_children()}
    empty = empty_parameters(scorer)
    for layer in scorer.modules():
        if isinstance(layer, FusedLoraLinear):
            layer.base_was_frozen = not any(p.requires_grad for p in layer.base_layer.parameters())
    for block in transformer_blocks(scorer.model):
        _read_whole(block, empty)
        parent, name = places[id(block)]
        setattr(parent, name, FullyShardedDataParallel(block, **how))
    _read_whole(scorer, empty)
    sharded: Any = FullyShardedDataParallel(scorer, **how)
    setattr(sharded, COUNTS, counts)
    return sharded


def _read_whole(module: nn.Module, empty: list[EmptyParameter]) -> None:
    """Give those parameters of a module that have no memory their weights; tied ones stay tied."""
    inside = set(module.modules())
    for one in empty:
        (owner, name), *_ = one.places
        if owner not in inside or not owner._parameters[name].is_meta:
            continue
        weights = one.files.read(one.inside).to(one.parameter.dtype)
        filled = nn.Parameter(weights, requires_grad=one.parameter.requires_grad)
        for owner, name in one.places:
            owner._parameters[name] = filled


def is_flat(scorer: nn.Module | None) -> TypeGuard[FullyShardedDataParallel]:
    """Tell whether a scorer is sharded by FSDP1."""
    return isinstance(scorer, FullyShardedDataParallel)


def parameter_counts(scorer: nn.Module) -> tuple[int, int]:
    """Count the parameters that train, and all, over all processes."""
    if is_flat(scorer):
        return getattr(scorer, COUNTS)
    parameters = list(scorer.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def norm_of_all(norm: Tensor) -> Tensor:
    """Combine the norms of the processes' parts of a gradient: the root of the sum of their squares."""
    ranks = current_ranks()
    return (ranks.mean(norm.double().square()) * ranks.world_size).sqrt().to(norm.dtype)


def named_state(module: nn.Module) -> dict[str, Tensor]:
    """Return what a module's state dict holds, under the same names, as this process has it: nothing is gathered."""
    found: dict[str, Tensor] = {}
    for prefix, owner in module.named_modules(remove_duplicate=False):
        buffers = {name: b for name, b in owner._buffers.items() if name not in owner._non_persistent_buffers_set}
        for name, value in {**owner._parameters, **buffers}.items():
            if value is not None:
                found[f"{prefix}.{name}".removeprefix(".").replace(WRAPPER, "")] = value
    return found


@contextmanager
def without_wrappers(model: nn.Module) -> Iterator[None]:
    """Let a model have the modules it had before it was sharded, for those who read names from them; runs nothing."""
    wrapped = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, FullyShardedDataParallel)
    ]
    for parent, name, child in wrapped:
        setattr(parent, name, child.module)
    try:
        yield
    finally:
        for parent, name, child in wrapped:
            setattr(parent, name, child)


def whole_flat_weights(scorer: FullyShardedDataParallel) -> dict[str, Tensor]:
    """Bring the trained weights of a sharded scorer's model together. All processes must take part.

    Args:
        scorer: with all weights trained, or some (adapters): then only those are returned.

    Returns:
        The model's state dict, on the CPU, in the first process; an empty one in the others. Tied weights stay one
        tensor.
    """
    everything = all(parameter.requires_grad for parameter in scorer.parameters())
    blocks = {f"{name}.": unit for name, unit in scorer.model.named_modules() if is_flat(unit)}
    whole: dict[str, Tensor] = {}
    for prefix, unit in {"": scorer, **blocks}.items():
        with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False, rank0_only=True):
            if current_ranks().rank > 0:
                continue
            state = named_state(unit if prefix else scorer.model)
            own = {name: p for name, p in state.items() if prefix or not name.startswith(tuple(blocks))}
            trained = {prefix + name: p for name, p in own.items() if everything or p.requires_grad}
            copies = {id(p): p.detach().to("cpu", copy=True) for p in trained.values()}
            whole |= {name: copies[id(p)] for name, p in trained.items()}
    return whole
