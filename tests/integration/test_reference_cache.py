"""The reference is scored once for what it depends on, and never again; a bad disk never spoils a run."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gamma_po.data import reference_cache, shards
from gamma_po.data.dataset import collate, cut_by_tokens
from gamma_po.data.reference_cache import BASE_FIELDS, SHARED_FIELDS, CachedLogps, ReferenceKey, Score, cached_logps
from gamma_po.data.shards import ShardFolder
from gamma_po.data.tokenization import TokenizedPair
from gamma_po.forwards import score as score_forwards
from gamma_po.ranks import Local, Ranks
from gamma_po.scorer import CompletionScorer
from gamma_po.types import PairLogps, PreferenceBatch
from tests import oracle
from tests.contracts import on_two_ranks, tiny_dataset
from tests.runs import fit, run, steps_of
from tests.tiny import tiny_model

LOGP_TOLERANCE = 1e-4  # nats per sequence, float32 against float64
ROUNDING = 1e-4  # nats per sequence, another batch in float32
KEY = ReferenceKey("w", "padded", "float32", "sdpa")
ROOT = Path(__file__).resolve().parents[2]
STEP = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"]


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records how many pairs each pass over a data set really scored."""
    passes: list[int] = []
    compute = reference_cache._compute

    def counting(scoring: Any, score: Any, pairs: Any, missing: Any, *rest: Any) -> None:
        passes.append(len(missing))
        compute(scoring, score, pairs, missing, *rest)

    monkeypatch.setattr(reference_cache, "_compute", counting)
    return passes


def cache_folders(tmp_path: Path) -> list[Path]:
    """The folders of the reference cache, one per reference."""
    return sorted((tmp_path / "cache" / "gamma_po" / "reference").iterdir())


def test_other_hyper_parameters_reuse_the_cache(
    scored: list[int], tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    run("fit", tiny_model_path, tiny_data, tmp_path, STEP)
    assert sorted(scored) == [10, 11, 32]
    scored.clear()
    for change in (
        ["--model.loss.beta", "0.7", "--model.margin", "Map", "--model.optimizer.lr", "0.1", "--seed_everything", "5"],
        ["--model.loss", "IPO", "--model.lora.r", "4", "--data.label_noise", "0.5"],
        ["--data.batch_size", "8", "--data.eval_batch_size", "2", "--trainer.accumulate_grad_batches", "2"],
        ["--data.length_window", "2", "--data.max_tokens_per_forward", "400", "--data.limit_train", "9"],
    ):
        run("fit", tiny_model_path, tiny_data, tmp_path, [*STEP, *change])
    assert scored == []
    assert len(cache_folders(tmp_path)) == 1


def test_other_weights_tokens_precision_attention_or_layout_are_scored_anew(
    scored: list[int], tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    tiny_model(seed=1).save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (other / name).write_bytes((Path(tiny_model_path) / name).read_bytes())
    for number, change in enumerate(
        (
            [],
            ["--model.policy.path", str(other)],
            ["--data.tokenization.max_completion_length", "6"],
            ["--model.policy.dtype", "bfloat16"],
            ["--trainer.precision", "bf16-mixed"],
            ["--model.policy.attention", "eager"],
            ["--data.layout", "shared_prefix"],
            ["--data.layout", "packed"],
        ),
        start=1,
    ):
        run("fit", tiny_model_path, tiny_data, tmp_path, [*STEP, *change])
        assert sorted(scored) == sorted([32, 10, 11] * number), change
    assert len(cache_folders(tmp_path)) == 7  # other tokens lie in the folder of the same reference


def test_the_policy_s_own_dtype_is_no_part_of_the_key_where_the_reference_is_another_model(
    scored: list[int], tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    reference = ["--model.reference_model.path", tiny_model_path, "--model.reference_model.dtype", "float32"]
    run("fit", tiny_model_path, tiny_data, tmp_path, [*STEP, *reference])
    run("fit", tiny_model_path, tiny_data, tmp_path, [*STEP, *reference, "--model.policy.dtype", "bfloat16"])
    assert sorted(scored) == [10, 11, 32]
    run("fit", tiny_model_path, tiny_data, tmp_path, [*STEP, *reference[:3], "bfloat16"])
    assert sorted(scored) == sorted([10, 11, 32] * 2)


def test_cached_and_copied_reference_agree_in_a_dtype_that_is_not_the_policy_s(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    def losses(source: str, dtype: str) -> torch.Tensor:
        options = ["--model.policy.dtype", "bfloat16", "--model.reference", source, "--model.loss.beta", "50"]
        options += ["--model.reference_model.path", tiny_model_path, "--model.reference_model.dtype", dtype]
        return torch.tensor(steps_of(fit(tiny_model_path, tiny_data, tmp_path, [*STEP, *options]), "train/loss"))

    cached_losses, copied, other = losses("cached", "float32"), losses("copy", "float32"), losses("copy", "bfloat16")
    torch.testing.assert_close(cached_losses, copied, rtol=0, atol=5 * ROUNDING)  # times β
    assert (copied - other).abs().max() > 30 * ROUNDING


class Scorer:
    """The tiny model as the reference, in batches; counts pairs and can be stopped."""

    def __init__(self, stop_after: int | None = None, extra: bool = True) -> None:
        self.model, self.stop_after, self.extra = CompletionScorer(tiny_model()), stop_after, extra
        self.calls: list[int] = []

    @contextmanager
    def opened(self) -> Iterator[Score]:
        yield self

    def __call__(self, batch: PreferenceBatch) -> PairLogps:
        if self.stop_after is not None and len(self.calls) == self.stop_after:
            raise KeyboardInterrupt
        self.calls.append(batch.num_pairs)
        with torch.no_grad():
            logps = score_forwards(self.model, batch)
        return logps if self.extra else logps._replace(chosen_shared=None, rejected_shared=None)


def cached(
    pairs: Any, folder: Path, scorer: Scorer | None = None, *, key: ReferenceKey = KEY, ranks: Ranks | None = None,
    cut: Any = None, **options: Any,
) -> CachedLogps:  # fmt: skip
    """The cache around the tiny model, in batches of 2."""
    return cached_logps(
        getattr(pairs, "pairs", pairs), (scorer or Scorer()).opened, key=key, folder=folder, ranks=ranks or Local(),
        batch_size=2, collate=partial(collate, pad_id=0, cut=cut), description="test", **options,
    )  # fmt: skip


def shard_files(folder: Path) -> list[Path]:
    """All shards of all references."""
    return sorted(folder.glob("*/*.safetensors"))


@pytest.fixture
def pairs(tiny_data: dict[str, str]) -> list[TokenizedPair]:
    """Eleven pairs."""
    return list(tiny_dataset(tiny_data["test"]).pairs)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard per two batches of two, and short waits."""
    monkeypatch.setattr(reference_cache, "PAIRS_PER_SHARD", 4)
    monkeypatch.setattr(shards, "SECONDS_BETWEEN_LOOKS", 0.01)


def assert_equal(a: PairLogps, b: PairLogps) -> None:
    """The same bits in every field."""
    for name, ours, theirs in zip(PairLogps._fields, a, b, strict=True):
        assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs)), name


def test_cached_values_are_those_of_a_naive_forward_in_the_order_of_the_pairs(
    pairs: list[TokenizedPair], tmp_path: Path
) -> None:
    first, scorer = cached(pairs, tmp_path), Scorer()
    again = cached(pairs, tmp_path, scorer)
    assert scorer.calls == []
    assert (first.read, first.computed, again.read, again.computed) == (0, 11, 11, 0)
    assert again.size == sum(file.stat().st_size for file in shard_files(tmp_path)) > 0
    chosen, rejected = oracle.pair_logps(oracle.double(tiny_model()), pairs)
    for logps in (first.logps, again.logps):
        torch.testing.assert_close(logps.chosen.double(), chosen, rtol=0, atol=LOGP_TOLERANCE)
        torch.testing.assert_close(logps.rejected.double(), rejected, rtol=0, atol=LOGP_TOLERANCE)
        assert logps.chosen_length.tolist() == [len(pair.chosen) for pair in pairs]


@pytest.mark.parametrize("part", ReferenceKey._fields)
def test_every_part_of_the_key_alone_makes_all_pairs_be_scored_anew(
    part: str, pairs: list[TokenizedPair], tmp_path: Path
) -> None:
    cached(pairs, tmp_path)
    assert cached(pairs, tmp_path, key=KEY._replace(**{part: "other"})).computed == 11
    assert (
        cached(pairs, tmp_path).computed == cached(pairs, tmp_path, key=KEY._replace(**{part: "other"})).computed == 0
    )


@pytest.mark.parametrize("part", ["prompt", "chosen", "rejected"])
def test_a_pair_with_another_token_is_scored_anew_and_only_that_one(
    part: str, pairs: list[TokenizedPair], tmp_path: Path
) -> None:
    cached(pairs, tmp_path)
    ids = getattr(pairs[3], part).clone()
    ids[-1] += 1
    pairs[3] = pairs[3]._replace(**{part: ids})
    assert cached(pairs, tmp_path).computed == 1
    moved = pairs[5]._replace(prompt=torch.cat([pairs[5].prompt, pairs[5].chosen[:1]]), chosen=pairs[5].chosen[1:])
    assert cached([*pairs, moved], tmp_path).computed == 1  # the same tokens, divided elsewhere


def test_subsets_other_orders_and_repeated_pairs_are_read(pairs: list[TokenizedPair], tmp_path: Path) -> None:
    whole = cached(pairs, tmp_path).logps
    order = [7, 2, 2, 10, 7]
    found = cached([pairs[i] for i in order], tmp_path)
    assert (found.read, found.computed) == (3, 0)
    assert_equal(found.logps, whole.map(lambda values: values[order]))
    twice = cached([*pairs[:4], *pairs[:4]], tmp_path / "new")
    assert twice.computed == 4
    torch.testing.assert_close(twice.logps.chosen, whole.chosen[[0, 1, 2, 3] * 2], rtol=0, atol=ROUNDING)


def test_batches_that_are_cut_into_forwards_give_each_pair_its_own_values(
    pairs: list[TokenizedPair], tmp_path: Path
) -> None:
    whole = cached(pairs, tmp_path / "whole").logps
    cut = cached(pairs, tmp_path / "cut", cut=partial(cut_by_tokens, layout="padded", limit=60)).logps
    torch.testing.assert_close(cut.chosen, whole.chosen, rtol=0, atol=ROUNDING)
    assert torch.equal(cut.rejected_length, whole.rejected_length)


@pytest.mark.parametrize("stop_after", [1, 2, 3, 5])
def test_an_interrupted_scoring_continues_behind_its_last_whole_shard_with_the_same_bits(
    stop_after: int, small_shards: None, pairs: list[TokenizedPair], tmp_path: Path
) -> None:
    whole = cached(pairs, tmp_path / "whole").logps
    with pytest.raises(KeyboardInterrupt):
        cached(pairs, tmp_path / "stopped", Scorer(stop_after))
    kept = 4 * (stop_after // 2)
    assert len(shard_files(tmp_path / "stopped")) == stop_after // 2
    scorer = Scorer()
    resumed = cached(pairs, tmp_path / "stopped", scorer)
    assert (resumed.read, resumed.computed, sum(scorer.calls)) == (kept, 11 - kept, 11 - kept)
    assert_equal(resumed.logps, whole)


def test_the_longest_pairs_are_scored_first(pairs: list[TokenizedPair], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        cached(pairs, tmp_path, Scorer(0))
    seen: list[int] = []

    class Watching(Scorer):
        def __call__(self, batch: PreferenceBatch) -> PairLogps:
            seen.append(batch.model_input.input_ids.shape[1])
            return super().__call__(batch)

    cached(pairs, tmp_path, Watching())
    assert seen[0] == max(len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in pairs)
    assert seen[0] > seen[-1]


KILLED = """
import sys, time
from pathlib import Path
from gamma_po.data import reference_cache
from tests.contracts import tiny_dataset
from tests.integration.test_reference_cache import Scorer, cached

reference_cache.PAIRS_PER_SHARD = 4

class Slow(Scorer):
    def __call__(self, batch):
        time.sleep(0.3 if len(self.calls) < 4 else 60)
        return super().__call__(batch)

cached(list(tiny_dataset(sys.argv[1]).pairs), Path(sys.argv[2]), Slow())
"""


def test_a_killed_run_leaves_whole_shards_and_no_claim(
    small_shards: None, pairs: list[TokenizedPair], tiny_data: dict[str, str], tmp_path: Path
) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    process = subprocess.Popen(
        [sys.executable, str(script), tiny_data["test"], str(tmp_path / "killed")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(shard_files(tmp_path / "killed")) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    found = cached(pairs, tmp_path / "killed")
    assert (found.read, found.computed) == (8, 3)
    torch.testing.assert_close(found.logps.chosen, cached(pairs, tmp_path / "new").logps.chosen, rtol=0, atol=ROUNDING)


class Blocked(Scorer):
    """Waits in its third batch until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.go = threading.Event(), threading.Event()

    def __call__(self, batch: PreferenceBatch) -> PairLogps:
        if len(self.calls) == 2:
            self.reached.set()
            assert self.go.wait(60)
        return super().__call__(batch)


def wait_until(true: Callable[[], bool]) -> None:
    """Poll for up to a minute."""
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_second_of_two_runs_waits_with_a_message_and_scores_nothing(
    small_shards: None, pairs: list[TokenizedPair], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = Blocked(), Scorer()
    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(2) as pool:
        one = pool.submit(cached, pairs, tmp_path, first)
        assert first.reached.wait(60)
        two = pool.submit(cached, pairs, tmp_path, second)
        wait_until(lambda: "another run is scoring the same pairs" in caplog.text)
        first.go.set()
        results = [one.result(60), two.result(60)]
    assert sum(first.calls) == 11 and second.calls == []
    assert (results[1].read, results[1].computed) == (11, 0)
    assert_equal(results[0].logps, results[1].logps)


def test_other_pairs_under_the_same_reference_need_not_wait(pairs: list[TokenizedPair], tmp_path: Path) -> None:
    first = Blocked()
    with ThreadPoolExecutor(1) as pool:
        one = pool.submit(cached, pairs[:6], tmp_path, first)
        assert first.reached.wait(60)
        assert cached(pairs[6:], tmp_path).computed == 5
        first.go.set()
        assert one.result(60).computed == 6


def test_where_nothing_can_be_locked_both_runs_score_and_neither_spoils_the_cache(
    pairs: list[TokenizedPair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown(self: object, **options: object) -> None:
        raise NotImplementedError("no flock here")

    monkeypatch.setattr(shards.FileLock, "acquire", unknown)
    first = Blocked()
    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(1) as pool:
        one = pool.submit(cached, pairs, tmp_path, first)
        assert first.reached.wait(60)
        other = cached(pairs, tmp_path)
        first.go.set()
        assert one.result(60).computed == other.computed == 11
    assert "no flock here" in caplog.text
    assert len(shard_files(tmp_path)) == 2
    again = cached(pairs, tmp_path)
    assert again.computed == 0
    assert_equal(again.logps, other.logps)


def test_two_ranks_share_the_work_and_get_what_one_gets(
    small_shards: None, pairs: list[TokenizedPair], tmp_path: Path
) -> None:
    alone = cached(pairs, tmp_path / "alone").logps
    scorers = [Scorer(), Scorer()]
    both = on_two_ranks(lambda ranks: cached(pairs, tmp_path / "two", scorers[ranks.rank], ranks=ranks))
    assert [len(scorer.calls) for scorer in scorers] == [3, 3]  # six batches
    for found in both:
        assert (found.read, found.computed) == (0, 11)
        assert_equal(found.logps, alone)
    assert sum(len(shards._read(file)[0]) for file in shard_files(tmp_path / "two")) == 11
    again = on_two_ranks(lambda ranks: cached(pairs, tmp_path / "two", ranks=ranks))
    assert [found.computed for found in again] == [0, 0]
    assert_equal(again[1].logps, alone)


def test_only_the_first_rank_touches_the_disk(
    pairs: list[TokenizedPair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touched: list[str] = []

    def watching(method: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any) -> Any:
            touched.append(threading.current_thread().name)
            return method(*arguments)

        return watched

    for name in ("read_into", "write", "check_room", "size"):
        monkeypatch.setattr(ShardFolder, name, watching(getattr(ShardFolder, name)))

    def step(ranks: Ranks) -> None:
        threading.current_thread().name = f"rank {ranks.rank}"
        cached(pairs, tmp_path, ranks=ranks)

    on_two_ranks(step)
    assert set(touched) == {"rank 0"}


def test_fields_that_a_loss_needs_and_the_cache_lacks_are_scored_and_kept(
    pairs: list[TokenizedPair], tmp_path: Path
) -> None:
    plain = cached(pairs, tmp_path, Scorer(extra=False))
    assert plain.logps.chosen_shared is None and cached(pairs, tmp_path).logps.chosen_shared is None
    needed = BASE_FIELDS + SHARED_FIELDS
    more = cached(pairs, tmp_path, needed=needed)
    assert more.computed == 11 and (more.logps.chosen_shared >= more.logps.chosen).all()
    again = cached(pairs, tmp_path, needed=needed)
    assert again.computed == cached(pairs, tmp_path).computed == 0
    assert_equal(again.logps, more.logps)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "other tensors", "fewer values"])
def test_a_damaged_shard_alone_is_computed_anew_with_a_warning(
    damage: str, small_shards: None, pairs: list[TokenizedPair], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = cached(pairs, tmp_path)
    file = next(file for file in shard_files(tmp_path) if len(shards._read(file)[0]) == 4)
    match damage:
        case "truncated":
            file.write_bytes(file.read_bytes()[:-7])
        case "garbage":
            file.write_bytes(b"\x00garbage" * 50)
        case "empty":
            file.write_bytes(b"")
        case "other tensors":
            save_file({"chosen": torch.zeros(3)}, file)
        case "fewer values":
            save_file({"pairs": torch.zeros(4, 16, dtype=torch.uint8), "chosen": torch.zeros(3)}, file)
    with caplog.at_level(logging.WARNING):
        again = cached(pairs, tmp_path)
    assert "is damaged" in caplog.text and str(file) in caplog.text
    assert again.computed == 4
    torch.testing.assert_close(again.logps.chosen, whole.logps.chosen, rtol=0, atol=ROUNDING)
    assert cached(pairs, tmp_path).computed == 0 and not file.exists()


def test_leftovers_of_an_interrupted_write_do_not_count(pairs: list[TokenizedPair], tmp_path: Path) -> None:
    cached(pairs, tmp_path)
    (file,) = shard_files(tmp_path)
    partial_one = file.rename(file.with_name(f".{file.name}.abc.partial"))
    long_ago = shutil.copy(partial_one, file.with_name(f".{file.name}.def.partial"))
    os.utime(long_ago, (time.time() - 2 * shards.ABANDONED,) * 2)
    assert cached(pairs, tmp_path).computed == 11
    assert list(file.parent.glob(".*.partial")) == [partial_one]  # which another process may be writing


def test_a_disk_that_fills_up_while_scoring_costs_the_cache_and_not_the_run(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    options = ["--trainer.limit_val_batches", "0"]
    expected = steps_of(run("fit", tiny_model_path, tiny_data, tmp_path, options).trainer_dir, "train/loss")
    cache = tmp_path / "cache" / "gamma_po" / "reference"
    for file in shard_files(cache):
        file.unlink()

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards, "write_bytes", full)
    with caplog.at_level(logging.WARNING):
        folder = run("fit", tiny_model_path, tiny_data, tmp_path, options).trainer_dir
    assert "could not be saved" in caplog.text and "No space left on device" in caplog.text
    assert steps_of(folder, "train/loss") == expected and len(expected) == 8
    assert shard_files(cache) == []


def test_a_write_that_fails_in_the_middle_leaves_nothing_behind(
    pairs: list[TokenizedPair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(source: str, target: Path) -> None:
        raise OSError(errno.EIO, "disk on fire")

    monkeypatch.setattr("gamma_po.files.os.replace", fails)
    assert cached(pairs, tmp_path).computed == 11
    assert [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".lock"] == []


def test_label_flips_neither_rescore_nor_mix_up_the_values(tiny_data: dict[str, str], tmp_path: Path) -> None:
    clean, noisy = tiny_dataset(tiny_data["test"]), tiny_dataset(tiny_data["test"], flips=(0, 3, 10))
    clean.reference = cached(clean, tmp_path).logps
    found = cached(noisy, tmp_path)
    noisy.reference = found.logps
    assert found.computed == 0
    labelled = noisy.labelled_reference()
    flipped = torch.tensor([row in (0, 3, 10) for row in range(11)])
    assert torch.equal(labelled.margin, torch.where(flipped, -1, 1) * clean.reference.margin)
    assert torch.equal(labelled.chosen_length[flipped], clean.reference.rejected_length[flipped])


def test_a_run_says_what_it_read_and_what_it_scored(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for expected in ("0 pairs read from the cache, 32 scored", "32 pairs read from the cache, 0 scored"):
        run("fit", tiny_model_path, tiny_data, tmp_path, STEP)
        (folder,) = cache_folders(tmp_path)
        said = "".join(capsys.readouterr().out.split())  # a terminal breaks lines anywhere
        for part in ("reference log-probabilities", expected, f"0.00 MiB in {folder}"):
            assert part.replace(" ", "") in said


def test_a_shard_that_cannot_be_read_is_left_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = tmp_path / "whole.safetensors"
    shard.write_bytes(b"whole")

    def refused(file: Path) -> None:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr("gamma_po.data.shards.load_file", refused)
    assert shards._read(shard) is None
    assert shard.read_bytes() == b"whole"
