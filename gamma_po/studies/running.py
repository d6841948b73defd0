"""Run jobs: draw worlds, train all settings in them, measure, and hand back one row per run.

Jobs share nothing, so they go to worker processes with one thread each; that is faster than threads within a
tensor operation of this size, and the numbers do not depend on it.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from gamma_po.margins import Fixed, NoMargin
from gamma_po.margins.base import strength
from gamma_po.progress import track
from gamma_po.studies.measures import Judge, log_likelihoods
from gamma_po.studies.network import Network, scores, with_constant
from gamma_po.studies.settings import Setting
from gamma_po.studies.training import Snapshots, Track, Trained, Training, ordered, train
from gamma_po.studies.worlds import HeldOut, Worlds, labels, reference_accuracy

Row = dict[str, Any]
Cell = tuple[str, float | None, float]  # arm, ρ (None where the reference is what it is), flip rate
_counter: Any = None  # steps taken by all workers, shared memory
REFERENCE_TOLERANCE = 1e-12  # rounding of sums in float64


class Testbed(Protocol):
    """Where worlds come from."""

    scope: ClassVar[str]  # what intervals over seeds hold for, where seeds alone do not say that

    def draw(self, seeds: Sequence[int], rhos: Sequence[float]) -> Worlds:
        """Return a world for every seed and ρ."""
        ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """One batched program.

    Args:
        testbed: S1 or S2.
        seeds: of the worlds.
        rhos: informativeness of the reference, a world each.
        settings: trained in every world.
        training: how.
        kls: KLs at which every policy is also measured, by rescaling its scores.
        traced: arms whose reward margins and gradient weights are kept.
        calibration_clean: where the testbed has calibration pairs: of how many the labels are not flipped.
    """

    testbed: Testbed
    seeds: tuple[int, ...]
    rhos: tuple[float, ...]
    settings: tuple[Setting, ...]
    training: Training = field(default_factory=Training)
    kls: tuple[float, ...] = (1.0,)
    traced: frozenset[str] = frozenset()
    calibration_clean: int = 0


class Trace(NamedTuple):
    """What pulled how hard, pooled over steps and seeds, [N] each."""

    reward_margin: Tensor
    weight: Tensor
    flipped: Tensor


class Results(NamedTuple):
    """Rows of all runs, and traces by arm, ρ and flip rate."""

    rows: list[Row]
    traces: dict[Cell, Trace]


def split(job: Job, seeds_at_once: int) -> list[Job]:
    """Cut a job by seeds."""
    pieces = [job.seeds[i : i + seeds_at_once] for i in range(0, len(job.seeds), seeds_at_once)]
    return [Job(**{**vars(job), "seeds": piece}) for piece in pieces]


def run_jobs(jobs: Sequence[Job], *, workers: int, description: str, visible: bool = True) -> Results:
    """Run jobs with a progress bar; the rows come in the order of the jobs.

    Args:
        jobs: independent of each other.
        workers: processes; 1 stays in this one.
        description: for the progress bar.
        visible: whether to show it.
    """
    context = multiprocessing.get_context("spawn")
    counter, total = context.Value("q", 0), sum(job.training.steps for job in jobs)
    count = min(workers, len(jobs))
    pool: Executor
    if count <= 1:
        pool = ThreadPoolExecutor(1, initializer=_start_counting, initargs=(counter,))
    else:
        pool = ProcessPoolExecutor(count, context, initializer=_start_worker, initargs=(counter,))
    try:
        futures = [pool.submit(_counted_run, job) for job in jobs]
        for _ in track(_pulses(futures, counter), description, total=total, visible=visible):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    return merged([future.result() for future in futures])


def merged(results: Sequence[Results]) -> Results:
    """Join results; traces of equal cells are pooled."""
    pooled: dict[Cell, list[Trace]] = {}
    for result in results:
        for cell, trace in result.traces.items():
            pooled.setdefault(cell, []).append(trace)
    traces = {cell: Trace(*map(torch.cat, zip(*parts, strict=True))) for cell, parts in pooled.items()}
    return Results([row for result in results for row in result.rows], traces)


def available_workers() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pulses(futures: Sequence[Future[Results]], counter: Any) -> Iterator[int]:
    """Yield once per optimizer step that any worker has taken, until all jobs are done; raise what a job raises."""
    seen, running = 0, set(futures)
    while running:
        done, running = wait(running, timeout=0.2, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        taken = counter.value
        yield from range(seen, taken)
        seen = taken


def _start_counting(counter: Any) -> None:
    global _counter
    _counter = counter


def _start_worker(counter: Any) -> None:
    _start_counting(counter)
    torch.set_num_threads(1)
    end_with_parent()


def end_with_parent() -> None:
    """End this worker when the process that waits for it was killed; nobody else would tell it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _counted_run(job: Job) -> Results:
    return run(job, _counted)


def _counted(steps: Iterable[int]) -> Iterator[int]:
    for step in steps:
        yield step
        with _counter.get_lock():
            _counter.value += 1


def run(job: Job, track: Track = iter) -> Results:
    """Run one job; `track` wraps its steps."""
    worlds, settings = job.testbed.draw(job.seeds, job.rhos), ordered(job.settings)
    trained = train(worlds, settings, job.training, track)
    columns = _training_columns(trained.snapshots)
    equal = _equal_to_base(trained, settings)
    accuracy = reference_accuracy(worlds.pairs)
    rows = []
    for world in range(len(worlds)):
        judged = _judged(worlds, world, trained.network, job.kls)
        gaps = _calibration_gaps(worlds, world, trained.network)
        for index, setting in enumerate(settings):
            row = _setting_columns(setting) | {"seed": worlds.seed[world], "rho": worlds.rho[world]}
            row |= {name: float(values[index]) for name, values in judged.items()}
            row |= {name: float(values[index, world]) for name, values in columns.items()}
            found = labels(worlds.pairs, setting.flip_rate)
            row |= {"ref_acc": float(accuracy[world]), "flipped": float(found.flipped[world].double().mean())}
            row |= {"wrong": float(found.wrong[world].double().mean()), "equal_to_base": equal.get((index, world))}
            if gaps is not None and worlds.calibration is not None:
                noisy = labels(worlds.calibration, setting.flip_rate).first_chosen[world]
                row |= _calibration_columns(gaps[index], worlds.calibration.first_preferred[world], noisy, job)
            rows.append(row)
    return Results(rows, _traces(worlds, settings, trained.snapshots, job.traced))


def _judged(worlds: Worlds, world: int, network: Network, kls: Iterable[float]) -> dict[str, Tensor]:
    """Measure all settings of a world, [S] each."""
    held_out = HeldOut(*(values[world] for values in worlds.held_out))
    x = with_constant(held_out.features.flatten(0, 1))[None]
    own = Network(network.weight[world : world + 1], network.out[world : world + 1])
    f = scores(own, x)[0].unflatten(1, held_out.gold.shape)
    return measured(Judge(held_out), f, kls)


def measured(judge: Judge, f: Tensor, kls: Iterable[float]) -> dict[str, Tensor]:
    """Measure policies, as trained and rescaled to KLs: scores [..., M, K] -> columns, [...] each.

    Raises:
        ArithmeticError: the reference does not win exactly half against itself.
    """
    reference = judge.outcome(torch.zeros(f.shape[-2:]))
    error = max(abs(float(reference.win_rate) - 0.5), abs(float(reference.kl)))
    if not error <= REFERENCE_TOLERANCE:
        raise ArithmeticError(f"the reference against itself has win rate {reference.win_rate}, KL {reference.kl}")
    trained = judge.outcome(f)
    columns = {"win_rate": trained.win_rate, "kl": trained.kl, "gold": trained.gold}
    columns |= {"pair_accuracy": judge.pair_accuracy(f), "reference_error": torch.full_like(trained.kl, error)}
    for kl in kls:
        scale = judge.scale_for(f, kl)
        columns[f"win_rate_kl{kl:g}"] = judge.outcome(f, scale).win_rate
        columns[f"scale_kl{kl:g}"] = scale
    return columns


def _calibration_gaps(worlds: Worlds, world: int, network: Network) -> Tensor | None:
    """f_first - f_second of the calibration pairs under all settings of a world, [S, N]."""
    if worlds.calibration is None:
        return None
    pairs = worlds.calibration
    own = Network(network.weight[world : world + 1], network.out[world : world + 1])
    first, second = (scores(own, with_constant(x[world])[None])[0] for x in (pairs.first, pairs.second))
    return first - second


def _calibration_columns(gap: Tensor, annotated: Tensor, noisy: Tensor, job: Job) -> Row:
    """Log-likelihoods of a few clean labels and of all noisy ones, [N] each, for a choice between settings."""
    count = job.calibration_clean
    signed = {"clean": torch.where(annotated, gap, -gap)[:count], "noisy": torch.where(noisy, gap, -gap)}
    return {f"calibration_{name}": log_likelihoods(values).float().numpy() for name, values in signed.items()}


def _training_columns(snapshots: Snapshots) -> dict[str, Tensor]:
    """Means over the records of training, [S, W] each."""
    weight, gamma = snapshots.weight, snapshots.target_margin
    total = weight.sum((0, 1)).clamp_min(1e-30)
    return {
        "gradient_on_flipped": (weight * snapshots.flipped).sum((0, 1)) / total,
        "gradient_on_wrong": (weight * snapshots.wrong).sum((0, 1)) / total,
        "gradient_weight": weight.mean((0, 1)),
        "gamma_mean": gamma.mean((0, 1)),
        "gamma_sd": gamma.std(1, correction=0).mean(0),
        "gamma_range": (gamma.amax(1) - gamma.amin(1)).mean(0),
        "reward_margin_last": snapshots.reward_margin[-1].mean(0),
    }


def _setting_columns(setting: Setting) -> Row:
    return {
        "arm": setting.arm,
        "flip_rate": setting.flip_rate,
        "loss": repr(setting.loss),
        "margin": repr(setting.margin),
        "mask": setting.mask,
        "beta": setting.loss.beta,
        "learning_rate": setting.learning_rate,
        "gamma0_over_tau": strength(setting.margin),
    }


def _equal_to_base(trained: Trained, settings: Sequence[Setting]) -> dict[tuple[int, int], bool]:
    """Whether runs with γ = 0 ended with the weights of the base loss, bit for bit; by setting and world."""
    found = {}
    for index, setting in enumerate(settings):
        if setting.margin != Fixed(gamma=0.0):
            continue
        for other, base in enumerate(settings):
            same = (base.loss, base.learning_rate, base.flip_rate, base.mask)
            if base.margin == NoMargin() and same == (
                setting.loss, setting.learning_rate, setting.flip_rate, setting.mask
            ):  # fmt: skip
                for world in range(len(trained.network.out)):
                    layers = [(layer[world, index], layer[world, other]) for layer in trained.network]
                    found[index, world] = all(torch.equal(*pair) for pair in layers)
    return found


def _traces(
    worlds: Worlds, settings: Sequence[Setting], snapshots: Snapshots, traced: frozenset[str]
) -> dict[Cell, Trace]:
    parts: dict[Cell, list[Trace]] = {}
    for index, setting in enumerate(settings):
        if setting.arm not in traced:
            continue
        for world, rho in enumerate(worlds.rho):
            fields = (snapshots.reward_margin, snapshots.weight, snapshots.flipped)
            own = Trace(*(values[:, :, index, world].flatten() for values in fields))
            parts.setdefault((setting.arm, rho, setting.flip_rate), []).append(own)
    return {cell: Trace(*map(torch.cat, zip(*found, strict=True))) for cell, found in parts.items()}
