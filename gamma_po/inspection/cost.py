"""What a run will need: memory by what holds it, and time, both measured on micro-batches of the run itself."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gamma_po.errors import ConfigError
from gamma_po.inspection.live import Counted, LiveBytes
from gamma_po.logps import CHUNK_ELEMENTS
from gamma_po.types import ModelInput

LIBRARIES = 90 * 2**20  # loaded by `fit` after its start, on a CPU; measured by experiments/benchmarks/memory.py
HOLES = 0.95  # of all that is needed: 0.02 to 0.91 were measured there, and no law was found
PROBE = 64  # rows and columns of the parameter on which an optimizer's state is measured, and of the largest for a step
CGROUP = Path("/sys/fs/cgroup")
SHARED = ("weights", "reference", "gradients", "optimizer")  # divided by FSDP1 and FSDP2


class Share(NamedTuple):
    """What a process holds where several share the weights: factors of what one alone would, and bytes on top."""

    processes: int = 1
    weights: float = 1.0
    reference: float = 1.0
    gradients: float = 1.0
    optimizer: float = 1.0
    gathered: int = 0  # weights of the others
    undivided: int = 0  # gradients in the backward pass, before each process has its part of them


WHOLE = Share()  # each process holds everything


class Memory(NamedTuple):
    """Bytes at the peak of a training step, by what holds them."""

    weights: int
    reference: int  # a copy kept in memory
    gradients: int  # that are there at this moment
    optimizer: int  # its state
    activations: int  # what the step makes and drops again, as far as it is there at this moment
    head: int  # one chunk of logits and their gradient, where they are not counted with the activations
    libraries: int  # that a run loads, on a CPU; a GPU's context is there before free memory is looked at
    gathered: int = 0  # weights of the other processes, where these share them
    undivided: int = 0  # gradients that are not shared yet, where processes share them

    @property
    def total(self) -> int:
        """The sum."""
        return sum(self)

    @property
    def holes(self) -> int:
        """What a CPU's malloc may hold back besides: blocks of less than 32 MiB, dropped where nothing new fits."""
        return round(HOLES * self.total) if self.libraries else 0

    def shared(self, share: Share) -> Memory:
        """Return what a process holds if several share weights, reference, gradients and optimizer.

        >>> Memory(8, 0, 8, 16, 5, 1, 2).shared(Share(4, 1 / 4, 1 / 4, 1 / 2, 1 / 4, gathered=3)).total
        21
        """
        parts = {name: round(getattr(self, name) * getattr(share, name)) for name in SHARED}
        return self._replace(**parts, gathered=share.gathered)


def parameter_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of the parameters, each tied one once."""
    return sum({p.data_ptr() or id(p): p.numel() * p.element_size() for p in parameters}.values())


def optimizer_bytes(factory: Callable[[list[Tensor]], Optimizer], trainable: Sequence[nn.Parameter]) -> int:
    """Bytes of the optimizer's state: measured on a small matrix of the same dtype, scaled to all parameters."""
    if not trainable:
        return 0
    probe = _probe(trainable[0])
    optimizer = _with_state(factory, [probe])
    tensors = [value for value in optimizer.state[probe].values() if isinstance(value, Tensor) and value.ndim]
    per_element = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / probe.numel()
    return int(per_element * sum(parameter.numel() for parameter in trainable))


def optimizer_step_bytes(factory: Callable[[list[Tensor]], Optimizer], trainable: Sequence[nn.Parameter]) -> int:
    """Bytes that an optimizer's step makes and drops again: counted on parameters of the same proportions, scaled.

    Some optimizers take all parameters at once; others go through them one by one, and let go of what one needed only
    while they are at the next. So the sizes matter, and their order.
    """
    if not trainable:
        return 0
    probes = _in_proportion(trainable)
    optimizer = _with_state(factory, probes)
    with LiveBytes() as live:
        optimizer.step()
    return int(live.mark() * sum(p.nbytes for p in trainable) / sum(p.nbytes for p in probes))


def _with_state(factory: Callable[[list[Tensor]], Optimizer], probes: list[Tensor]) -> Optimizer:
    """Make an optimizer and let it take a step, at which it makes its state."""
    optimizer = factory(probes)
    try:
        optimizer.step()
    except (TypeError, RuntimeError) as error:
        raise ConfigError(
            f"model.optimizer={type(optimizer).__name__} takes no step from gradients alone, so its memory cannot be "
            f"measured ({str(error).splitlines()[0]}); allowed in `inspect`: optimizers of dense gradients, without a "
            "closure"
        ) from error
    return optimizer


def _in_proportion(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Parameters with gradients, each by the same factor smaller, so that the largest has at most PROBE² numbers."""
    scale = min(1.0, PROBE / math.sqrt(max(parameter.numel() for parameter in parameters)))
    probes: list[Tensor] = []
    for parameter in parameters:
        rows = parameter.shape[0] if parameter.ndim > 1 else 1
        columns = parameter.numel() // rows
        by = (scale, scale) if parameter.ndim > 1 else (1.0, scale**2)
        probes.append(_probe(parameter, *(max(1, round(n * s)) for n, s in zip((rows, columns), by, strict=True))))
    return probes


def _probe(like: nn.Parameter, rows: int = PROBE, columns: int = PROBE) -> nn.Parameter:
    """A small matrix with a gradient, of the same dtype and device; on the CPU where there are only shapes."""
    device = "cpu" if like.is_meta else like.device
    probe = nn.Parameter(torch.zeros(rows, columns, dtype=like.dtype, device=device))
    probe.grad = torch.ones_like(probe)
    return probe


def at_peak(held: Memory, counted: Counted, step: int, *, accumulates: bool, share: Share = WHOLE) -> Memory:
    """Return what is held at the moment of a step at which it is most, before what is shared is divided.

    Activations and gradients are not all there at one time: the backward pass drops the ones and makes the others,
    and the optimizer comes behind it. In the forward pass the gradients of the step before are still there.

    Args:
        held: what stays, with all gradients.
        counted: of the micro-batch.
        step: that the optimizer's step makes and drops.
        accumulates: a step has several micro-batches, so that gradients are there throughout.
        share: of a process, which decides about the moment.
    """
    step = round(step * share.optimizer)
    there = held.gradients if accumulates else 0
    moments = [(held.gradients, counted.most[0], 0), (held.gradients, step, 0)]
    for most, arrived in zip(counted.most[1:], counted.arrived[1:], strict=True):
        moments.append((there + arrived, most - arrived, share.undivided))
    gradients, passing, undivided = max(moments, key=lambda moment: moment[0] * share.gradients + sum(moment[1:]))
    return held._replace(gradients=gradients, activations=passing, undivided=undivided)


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


def library_bytes(device: torch.device) -> int:
    """Bytes of the libraries that a run loads after its start: on a CPU a constant, as measured."""
    return LIBRARIES if device.type == "cpu" else 0


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
