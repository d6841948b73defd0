"""Time, peak memory and counted FLOPs of a step, and how fast this machine multiplies matrices."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

GEMM_SIZES = ((1024, 1024, 1024), (2048, 2048, 2048), (2048, 576, 1536))
MIB = 2**20


class Spent(NamedTuple):
    """What a step cost."""

    cost: float  # seconds: of the process on all its cores (CPU), or between CUDA events
    wall: float  # seconds


class Meter:
    """Measures from `start` to `stop`; nothing of what happens between stop and start counts."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._flops: FlopCounterMode | None = None

    def start(self) -> None:
        """Begin a step."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self) -> Spent:
        """End it."""
        cost = time.process_time() - self._cpu
        if self.device == "cuda":
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            torch.cuda.synchronize()
            cost = self._event.elapsed_time(end) / 1000
        return Spent(cost, time.perf_counter() - self._wall)

    def reset_peak(self) -> None:
        """Forget the memory of loading and warming up, after giving free memory back to the system."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again at what is resident now

    def peak(self) -> float:
        """Peak since the reset, MiB: resident memory of the whole process, or allocated on the GPU."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / MIB
        lines = Path("/proc/self/status").read_text().splitlines()
        (kib,) = [line.split()[1] for line in lines if line.startswith("VmHWM")]
        return int(kib) / 1024

    def count_flops(self) -> None:
        """Count from now on."""
        self._flops = flop_counter()
        self._flops.__enter__()

    def counted_flops(self) -> int:
        """Stop counting and return the FLOPs of all matrix products and attention since `count_flops`."""
        counter, self._flops = self._flops, None
        counter.__exit__(None, None, None)
        return counter.get_total_flops()


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter, taught about the CPU's attention kernel (full squares, masked or not, as elsewhere) and about
    products that are added in place."""

    def added(to, left, right, *args, out_shape=None, **kwargs) -> int:
        return 2 * left[0] * left[1] * right[1]

    def forward(query, key, value, *args, out_shape=None, **kwargs) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad, query, key, value, *args, out_shape=None, **kwargs) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten.addmm_: added,
            aten._scaled_dot_product_flash_attention_for_cpu: forward,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        },
    )


def gemm_peak(device: str, dtype: torch.dtype, *, seconds: float = 2.0) -> float:
    """Measure the best rate of matrix products, FLOP per second of `Spent.cost`; of each size the median counts.

    Args:
        device: cpu or cuda.
        dtype: of the factors.
        seconds: spent on each size.
    """
    return max(_gemm_rate(device, dtype, size, seconds) for size in GEMM_SIZES)


def _gemm_rate(device: str, dtype: torch.dtype, size: tuple[int, int, int], seconds: float) -> float:
    rows, inner, columns = size
    a = torch.randn(rows, inner, device=device).to(dtype)
    b = torch.randn(columns, inner, device=device).to(dtype).T
    meter, rates, deadline = Meter(device), [], time.perf_counter() + seconds
    repeats = 3
    while len(rates) < 3 or time.perf_counter() < deadline:
        meter.start()
        for _ in range(repeats):
            a @ b
        rates.append(2 * rows * inner * columns * repeats / meter.stop().cost)
    return statistics.median(rates[1:])
