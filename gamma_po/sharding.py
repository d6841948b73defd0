"""Spread a model's weights over processes (FSDP2), a transformer block at a time, and bring them together again."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from gamma_po.errors import ConfigError, require
from gamma_po.policies import ModelConfig
from gamma_po.ranks import current_ranks
from gamma_po.scorer import CompletionScorer
from gamma_po.weight_files import WeightFiles, source_of

DATA, TENSOR = "data_parallel", "tensor_parallel"  # what Lightning calls the dimensions of its mesh
# Trainer's precision -> what weights are gathered in (None: as they are) and gradients are summed in.
POLICIES = {
    "32-true": MixedPrecisionPolicy(),
    "bf16-true": MixedPrecisionPolicy(reduce_dtype=torch.float32),
    "16-true": MixedPrecisionPolicy(reduce_dtype=torch.float32),
    "bf16-mixed": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
}


def check_sharding(config: ModelConfig, precision: str, *, processes: int, tensor_parallel: int) -> None:
    """Refuse what cannot be sharded, before anything is loaded.

    Args:
        config: of the policy or the reference.
        precision: the trainer's.
        processes: of the run.
        tensor_parallel: of them, along the mesh's second dimension.

    Raises:
        ConfigError: naming the option and what is allowed.
    """
    require(precision in POLICIES, "trainer.precision with ModelParallelStrategy", precision, ", ".join(POLICIES))
    if tensor_parallel > 1:
        raise ConfigError(
            f"trainer.strategy: tensor_parallel_size={tensor_parallel}, weights are sharded over the data-parallel "
            f"processes only; give tensor_parallel_size: 1 and data_parallel_size: {processes}"
        )
    if config.quantization is not None:
        raise ConfigError(
            f"quantization={config.quantization} does not work with ModelParallelStrategy: weights of 4 bits cannot be "
            "sharded; allowed: quantization: null, or trainer.strategy: ddp, where each GPU holds the whole small model"
        )


def shard(scorer: CompletionScorer, mesh: DeviceMesh, precision: str) -> CompletionScorer:
    """Shard a scorer in place: each process keeps 1/n of every weight, and reads no more of it if it is not loaded.

    A transformer block's weights are gathered when it runs and freed behind it; embedding, last norm and head belong
    to the scorer itself, and are gathered for its forward. Names of weights stay the same. From here on all processes
    must run equally many forwards, and only through the scorer's own call.

    Args:
        scorer: the same weights on every process, or none yet (`policies.load_parts`).
        mesh: of the processes, as Lightning makes it.
        precision: the trainer's.

    Raises:
        ConfigError: the architecture does not say what its blocks are.
    """
    how = {"mesh": mesh[DATA], "mp_policy": POLICIES[precision]}
    for block in transformer_blocks(scorer.model):
        fully_shard(block, **how)
    fully_shard(scorer, **how)
    _read_own_part(scorer)
    return scorer


class EmptyParameter(NamedTuple):
    """A parameter without memory, and where its weights are."""

    parameter: nn.Parameter
    places: list[tuple[nn.Module, str]]  # modules that have it, and what they call it; a tied one has several
    files: WeightFiles
    inside: str  # its name there


def empty_parameters(scorer: CompletionScorer) -> list[EmptyParameter]:
    """Return the parameters that are not loaded yet (`policies.load_parts`)."""
    source = source_of(scorer)
    found: dict[int, EmptyParameter] = {}
    for prefix, module in scorer.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                one = EmptyParameter(parameter, [], *source[f"{prefix}.{name}"])
                found.setdefault(id(parameter), one).places.append((module, name))
    return list(found.values())


def _read_own_part(scorer: CompletionScorer) -> None:
    """Give sharded parameters without memory their part of the weights, a tensor at a time."""
    for empty, places, files, inside in empty_parameters(scorer):
        assert empty.placements == (Shard(0),)
        mesh = empty.device_mesh
        share = -(-len(empty) // mesh.size())
        start, end = (min(number * share, len(empty)) for number in (mesh.get_local_rank(), mesh.get_local_rank() + 1))
        part = files.rows(inside, start, end).to(mesh.device_type, empty.dtype)
        tensor = DTensor.from_local(
            part, mesh, empty.placements, run_check=False, shape=empty.shape, stride=empty.stride()
        )
        filled = nn.Parameter(tensor, requires_grad=empty.requires_grad)
        for owner, called in places:
            owner._parameters[called] = filled


def transformer_blocks(model: PreTrainedModel | PeftModel) -> list[nn.Module]:
    """Return the blocks that the architecture declares, outermost ones only, in order.

    Raises:
        ConfigError: it declares none.
    """
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    found = list(_outermost(causal, frozenset(causal._no_split_modules or ())))
    if not found:
        raise ConfigError(
            f"{causal.config.model_type} does not say what its transformer blocks are, so it cannot be sharded; "
            "allowed: trainer.strategy: ddp, where the model fits into one GPU"
        )
    return found


def _outermost(module: nn.Module, names: frozenset[str]) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, GradientCheckpointingLayer) or type(child).__name__ in names:
            yield child
        else:
            yield from _outermost(child, names)


def gathered_in(precision: str, *, sharded: bool) -> str:
    """Name the arithmetic of a forward, for the reference cache: weights gathered in bfloat16 give other last digits.

    >>> gathered_in("bf16-mixed", sharded=True), gathered_in("32-true", sharded=True)
    ('bf16-mixed/gathered', '32-true')
    """
    casts = sharded and POLICIES[precision].param_dtype is not None
    return f"{precision}/gathered" if casts else precision


def whole_weights(model: nn.Module) -> dict[str, Tensor] | None:
    """Bring the trained weights of a sharded model together, tensor by tensor. All processes must take part.

    Args:
        model: with all weights trained, or some (adapters): then only those.

    Returns:
        None if the model is not sharded. Otherwise its state dict, on the CPU, in the first process; an empty one in
        the others. Tied weights stay one tensor.
    """
    state = model.state_dict(keep_vars=True)
    if not any(isinstance(value, DTensor) for value in state.values()):
        return None
    everything = all(parameter.requires_grad for parameter in model.parameters())
    whole: dict[int, Tensor] = {}
    names: dict[str, int] = {}
    for name, value in state.items():
        if not (everything or value.requires_grad):
            continue
        if id(value) not in whole:
            full = value.detach().full_tensor() if isinstance(value, DTensor) else value.detach()
            whole[id(value)] = full.cpu() if current_ranks().rank == 0 else full.new_empty(0)
        names[name] = id(value)
    return {name: whole[key] for name, key in names.items()} if current_ranks().rank == 0 else {}


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raise what a disk has said, where torch, writing a checkpoint, gives it as an exception of its own.

    Raises:
        OSError: the disk refuses.
    """
    try:
        yield
    except CheckpointException as error:  # on every process, of shards
        of_the_disk = [found for found, _ in error.failures.values() if isinstance(found, OSError)]
        raise (of_the_disk[0] if of_the_disk else RuntimeError(str(error))) from error
    except RuntimeError as error:  # on the first process, of what lies beside shards
        if "PytorchStreamWriter" not in str(error):
            raise
        raise OSError(errno.EIO, f"a checkpoint cannot be written: {error}") from error
