"""What a run will need: memory by what holds it, and time, both measured on micro-batches of the run itself."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gamma_po.logps import CHUNK_ELEMENTS
from gamma_po.types import ModelInput

LIBRARIES = 150 * 2**20  # loaded by `fit` after its start, on a CPU; measured
HELD_BACK = 0.15  # of what comes and goes in a step; measured on a CPU
PROBE = 64  # rows and columns of the parameter on which an optimizer's state is measured
CGROUP = Path("/sys/fs/cgroup")
SHARED = ("weights", "reference", "gradients", "optimizer")  # divided by FSDP2


class Memory(NamedTuple):
    """Bytes at the peak of a training step, by what holds them."""

    weights: int
    reference: int  # a copy kept in memory
    gradients: int
    optimizer: int
    activations: int  # what the backward pass needs, for the longest micro-batch
    head: int  # one chunk of logits and their gradient
    around: int  # what allocators hold back, and on a CPU the libraries that a run loads: `around_bytes`
    gathered: int = 0  # weights of the other processes, where these share them

    @property
    def total(self) -> int:
        """The sum."""
        return sum(self)

    def shared(self, processes: int, gathered: int) -> Memory:
        """Return what each process holds if they share weights, reference, gradients and optimizer.

        >>> Memory(8, 0, 8, 16, 5, 1, 2).shared(4, gathered=3).total
        19
        """
        parts = {name: -(-getattr(self, name) // processes) for name in SHARED}
        return self._replace(**parts, gathered=gathered)


def parameter_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of the parameters, each tied one once."""
    return sum({p.data_ptr() or id(p): p.numel() * p.element_size() for p in parameters}.values())


def optimizer_bytes(factory: Callable[[list[Tensor]], Optimizer], trainable: Sequence[nn.Parameter]) -> int:
    """Bytes of the optimizer's state: measured on a small matrix of the same dtype, scaled to all parameters."""
    if not trainable:
        return 0
    probe = nn.Parameter(torch.zeros(PROBE, PROBE, dtype=trainable[0].dtype))
    optimizer = factory([probe])
    probe.grad = torch.ones_like(probe)
    optimizer.step()
    tensors = [value for value in optimizer.state[probe].values() if isinstance(value, Tensor) and value.ndim]
    per_element = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / probe.numel()
    return int(per_element * sum(parameter.numel() for parameter in trainable))


def saved_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that a forward pass keeps for its backward pass, the parameters themselves aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output  # alive until here: what is kept is in its graph, and no address is used twice
    return sum(kept.values())


def at_batch_size(longest: int, one: int, two: int, num_pairs: int) -> int:
    """Bytes for a micro-batch of long pairs: a part that stays, and one per pair.

    Args:
        longest: bytes for one long pair.
        one, two: for one and for two short pairs, which tell what stays and take little time.
        num_pairs: of the micro-batch.

    >>> at_batch_size(30, 10, 14, 8)  # 6 stay
    198
    """
    stays = min(longest, max(0, 2 * one - two))
    return stays + num_pairs * (longest - stays)


def head_bytes(model_input: ModelInput, num_pairs: int, vocab_size: int, itemsize: int) -> int:
    """Bytes of one chunk of logits in the model's dtype and in float32, and of both gradients.

    Args:
        model_input: of one pair.
        num_pairs: of the micro-batch.
        vocab_size: logits per position.
        itemsize: bytes of a number in the model's dtype.
    """
    elements = CHUNK_ELEMENTS.get(model_input.targets.device.type, CHUNK_ELEMENTS["other"])
    return min(max(elements, vocab_size), num_pairs * len(model_input.targets) * vocab_size) * 2 * (itemsize + 4)


def around_bytes(passing: int, device: torch.device) -> int:
    """Bytes that a process takes beside what a step needs.

    Args:
        passing: activations and logits, which come and go.
        device: libraries count where they lie in the same memory.
    """
    return int(HELD_BACK * passing) + (LIBRARIES if device.type == "cpu" else 0)


def timed(step: Callable[[], object], device: torch.device, *, seconds: float, most: int) -> float:
    """Return the mean time of a step, [s], of those that there is time for, at least one.

    Args:
        step: what is timed.
        device: is waited for.
        seconds: no further step starts after this time.
        most: steps, >= 1.
    """
    times: list[float] = []
    began = time.perf_counter()
    while not times or (len(times) < most and time.perf_counter() - began < seconds):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return sum(times) / len(times)


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    return min(free, _free_in_cgroup(free))


def _free_in_cgroup(otherwise: int) -> int:
    """What the container's limit leaves; file caches count as free, as the kernel gives them back."""
    limit, used, statistics = (CGROUP / f"memory.{name}" for name in ("max", "current", "stat"))
    if not (limit.is_file() and used.is_file() and statistics.is_file()) or limit.read_text().strip() == "max":
        return otherwise
    counts = dict(line.split() for line in statistics.read_text().splitlines())
    return int(limit.read_text()) - int(used.read_text()) + int(counts.get("inactive_file", 0))
