"""`inspect` says before a run what it would do, and refuses what would fail or is likely wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.sharding import scaling
from gamma_po import logps
from gamma_po.__main__ import main
from gamma_po.data.batching import TokenCosts
from gamma_po.data.tokenization import TokenizedPair
from gamma_po.errors import ConfigError
from gamma_po.inspection.cost import (
    Memory,
    Share,
    at_peak,
    library_bytes,
    optimizer_bytes,
    optimizer_step_bytes,
    parameter_bytes,
)
from gamma_po.inspection.dry_run import DryRun, memory_findings, most_tokens
from gamma_po.inspection.live import Counted, LiveBytes
from gamma_po.inspection.pairs import ends
from gamma_po.inspection.sharded import even_share
from gamma_po.scorer import CompletionScorer
from tests.memory import ENOUGH, dry_run, estimated, taken
from tests.runs import arguments
from tests.saved import saved_bytes
from tests.tiny import tiny_model, tiny_rows, tiny_tokenizer, write_rows

Inspect = Callable[..., tuple[int, str]]
NUMBER = r"(\d+\.\d+)"


@pytest.fixture
def inspect(
    tiny_model_path: str,
    tiny_data: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Inspect:
    """Runs `inspect` on the tiny run with further options; returns the status and all that was written."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*options: str) -> tuple[int, str]:
        status = main(["inspect", *arguments(tiny_model_path, tiny_data, tmp_path, list(options))])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


def test_a_sound_run_is_described_and_nothing_is_started(inspect: Inspect, tmp_path: Path) -> None:
    status, text = inspect("--model.margin.tau", "0.5")
    assert status == 0
    for part in (
        "arXiv 2305.18290", "arXiv 2506.03690", "γ0/τ  ", "reward units",  # formula, units, paper
        "<|im_start|>user⏎", "(scored)",  # tokens with their role
        "histogram", "32 from", "0 of 32 labels flipped", "0 prompts with two BOS",
        "0 of 64 completions without an end",
        "ref_acc, raw", "ref_acc, length-normalised", "optimizer ", "activations", "an epoch of training",
        "ready: nothing speaks against this run",
    ):  # fmt: skip
        assert part in text, part
    assert not (tmp_path / "runs").exists()


def test_the_accuracy_of_the_reference_is_that_of_its_log_probabilities(
    inspect: Inspect, tiny_data: dict[str, str]
) -> None:
    _, text = inspect("--inspect.sample", "32", "--inspect.seconds", "60")
    model, tokenizer = tiny_model().double(), tiny_tokenizer()

    def logp(prompt: str, completion: str) -> tuple[float, int]:
        message = [{"role": "user", "content": prompt}]
        before = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        head, tail = tokenizer(before).input_ids, [*tokenizer(completion).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logps = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
        picked = [float(logps[len(head) - 1 + i, token]) for i, token in enumerate(tail)]
        return sum(picked), len(picked)

    rows = [json.loads(line) for line in Path(tiny_data["train"]).read_text().splitlines()]
    raw = mean = 0
    for row in rows:
        (chosen, n), (rejected, m) = logp(row["prompt"], row["chosen"]), logp(row["prompt"], row["rejected"])
        raw += chosen > rejected
        mean += chosen / n > rejected / m
    assert re.search(rf"ref_acc, raw +{raw / len(rows):.3f} \[", text)
    assert re.search(rf"ref_acc, length-normalised +{mean / len(rows):.3f} \[", text)


def test_trainable_parameters_are_counted(inspect: Inspect) -> None:
    _, text = inspect("--model.lora.r", "4", "--model.lora.target_modules", '["q_proj"]')
    total = sum(p.numel() for p in tiny_model().parameters())
    trained = 2 * (32 * 4 + 4 * 32)  # two layers, 32 × 32, rank 4
    assert f"{trained:,} of {total + trained:,} parameters" in text


@pytest.mark.parametrize(
    ("options", "level", "problem", "change"),
    [
        (["--model.optimizer.lr", "0.1"], "likely wrong", "the learning rate is 0.1", "model.optimizer.lr"),
        (["--data.tokenization.max_completion_length", "3"], "likely wrong", "lose tokens", "max_completion_length"),
        (
            ["--data.tokenization.max_prompt_length", "26", "--data.tokenization.max_length", "31"],
            *("likely wrong", "32 of 32 pairs lose tokens", "or max_length"),
        ),
        (["--data.test", "TRAIN"], "likely wrong", "test split are also in the training split", "by prompt"),
        (["--data.columns.chosen", "rejected", "--data.columns.rejected", "chosen"], "note", "steps", "epochs"),
    ],
    ids=["learning rate", "truncation", "truncation of both", "leak", "few steps"],
)
def test_what_looks_wrong_is_named_with_what_to_change(
    options: list[str], level: str, problem: str, change: str, inspect: Inspect, tiny_data: dict[str, str]
) -> None:
    status, text = inspect(*[tiny_data["train"] if word == "TRAIN" else word for word in options])
    (line,) = [number for number, found in enumerate(text.splitlines()) if problem in found and level in found]
    assert change in text.splitlines()[line + 1]
    assert status == (1 if level == "likely wrong" else 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.train", "/no/such.jsonl"], "/no/such.jsonl: no such file"),
        (["--model.loss", "DPOO"], "unknown name 'DPOO'; allowed: DPO,"),
        (["--data.batch_size", "64"], "fewer than one global batch of 64"),
        (["--model.policy.path", "/no/such/model"], "no such folder"),
        (["--inspect.sample", "0"], "inspect.sample=0"),
        (["--samples.num_prompts", "3", "--data.validation", "null"], "samples.split='validation': data.validation is"),
        (["--run.root", "TRAIN"], "run.root="),
    ],
)
def test_what_fit_would_refuse_is_refused_with_its_message(
    options: list[str], message: str, inspect: Inspect, tiny_data: dict[str, str]
) -> None:
    status, text = inspect(*[tiny_data["train"] if word == "TRAIN" else word for word in options])
    assert status == 1
    assert f"error: {message}" in text or message in text.split("error: ")[1]


EPS = "model.optimizer.eps=1e-08 is 0 in float16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.policy.dtype", "float16"], EPS),
        (["--trainer.precision", "16-true"], EPS),
        (["--trainer.precision", "16-true", "--model.lora.r", "2"], EPS),
        (["--model.optimizer.lr", "-1"], "model.optimizer: Invalid learning rate"),
    ],
    ids=["float16", "16-true", "16-true with adapters", "learning rate"],
)
def test_an_optimizer_that_fit_refuses_is_refused_with_its_message_before_data_and_model_are_read(
    options: list[str],
    message: str,
    inspect: Inspect,
    tiny_model_path: str,
    tiny_data: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["fit", *arguments(tiny_model_path, tiny_data, tmp_path, options)]) == 2
    (refused,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    status, text = inspect(*options, "--data.train", "/no/such.jsonl")
    assert status == 1 and message in refused and refused in text.splitlines()


def test_adapters_on_a_float16_base_are_not_refused_as_they_are_float32(inspect: Inspect) -> None:
    assert inspect("--model.policy.dtype", "float16", "--model.lora.r", "2", "--inspect.seconds", "1")[0] == 0


def test_a_number_that_the_margin_cannot_take_is_refused_with_its_row(inspect: Inspect, tmp_path: Path) -> None:
    rows = [row | {"gap": float(i != 4)} for i, row in enumerate(tiny_rows(8))]
    file = str(write_rows(tmp_path / "pairs.jsonl", rows))
    column = ["--data.columns.margin", "gap", "--model.margin", "Column", "--model.margin.transform", "log"]
    status, text = inspect("--data.train", file, "--data.validation", "null", "--data.test", "null", *column)
    assert status == 1
    assert "pairs.jsonl, row 5 (line 5): the margin column gives 0, which the margin Column(" in text


def test_contradicting_pairs_are_found(inspect: Inspect, tmp_path: Path) -> None:
    rows = tiny_rows(8)
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:3]]
    file = write_rows(tmp_path / "pairs.jsonl", [*rows, *turned])
    status, text = inspect("--data.train", str(file))
    assert status == 1
    assert "6 of 11 pairs contradict another one" in text


def test_beginnings_and_ends_are_counted_as_they_are_made() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> TokenizedPair:
        return TokenizedPair(*(torch.tensor(ids, dtype=torch.int32) for ids in (prompt, chosen, rejected)), False)

    pairs = [pair([bos, bos, 9], [9, eos], [9, 8]), pair([bos, 9], [9, eos, eos], [eos])]
    found = ends(pairs, tokenizer)
    assert found == (1, 0, 1, 1)  # two BOS once; this tokenizer adds none; one without an end; one with two


def test_the_optimizers_state_is_measured() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(100, 30)), torch.nn.Parameter(torch.zeros(7))]
    numbers = 100 * 30 + 7
    assert optimizer_bytes(torch.optim.AdamW, parameters) == 2 * 4 * numbers  # first and second moments, float32
    assert optimizer_bytes(lambda p: torch.optim.SGD(p, lr=1.0), parameters) == 0
    assert optimizer_bytes(lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9), parameters) == 4 * numbers


@pytest.mark.parametrize(
    ("foreach", "expected"), [(False, 2 * 300), (True, 300 + 7)], ids=["one by one", "all at once"]
)
def test_what_an_optimizer_makes_and_drops_in_a_step_is_counted(foreach: bool, expected: int) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(100, 3)), torch.nn.Parameter(torch.zeros(7))]
    found = optimizer_step_bytes(lambda p: torch.optim.AdamW(p, foreach=foreach), parameters)
    # √v, and one by one √v / √(1 - β₂ᵗ) beside it; a step's own numbers besides
    assert found == pytest.approx(4 * expected, rel=0.02)
    assert optimizer_step_bytes(lambda p: torch.optim.SGD(p, lr=1.0, foreach=False), parameters) == 0


@pytest.mark.parametrize("optimizer", [torch.optim.LBFGS, torch.optim.SparseAdam])
def test_an_optimizer_that_takes_no_step_from_dense_gradients_alone_is_named(optimizer: type) -> None:
    for count in (optimizer_bytes, optimizer_step_bytes):
        with pytest.raises(ConfigError, match=rf"model.optimizer={optimizer.__name__} takes no step .*; allowed in"):
            count(optimizer, [torch.nn.Parameter(torch.zeros(100, 3))])


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("shapes", [[(900, 300), *[(200, 300)] * 9, (300,)], [*[(300, 200)] * 9, (300,), (900, 300)]])
def test_what_a_step_of_many_parameters_makes_is_counted_on_small_ones(
    shapes: list[tuple[int, ...]], foreach: bool
) -> None:
    def factory(of: list[torch.Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(of, foreach=foreach)

    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    found = optimizer_step_bytes(factory, parameters)
    optimizer = factory(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with LiveBytes() as live:
        optimizer.step()
    assert found == pytest.approx(live.mark(), rel=0.05)


LONG = {"hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 192}


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    """A model of four layers, and pairs of 20 to 250 tokens."""
    folder = tmp_path_factory.mktemp("longer")
    tiny_model(**LONG).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [row | {"chosen": row["chosen"] * (1 + i % 5), "rejected": row["rejected"] * (1 + i % 7)}
            for i, row in enumerate(tiny_rows(24))]  # fmt: skip
    file = str(write_rows(folder / "rows.jsonl", rows))
    return str(folder / "model"), {"train": file, "validation": file, "test": file}


RUNS = {
    "lora, checkpointing, copy": ["--model.gradient_checkpointing", "true", "--model.reference", "copy"],
    "lora, padded, adapters off": ["--data.layout", "padded", "--model.reference", "adapters_off"],
    "lora, cut": ["--data.max_tokens_per_forward", "600"],
    "all weights": ["--model.lora", "null"],
    "all weights, bf16, accumulation": [
        *("--model.lora", "null", "--trainer.precision", "bf16-mixed", "--trainer.accumulate_grad_batches", "2"),
        *("--data.batch_size", "2", "--model.gradient_checkpointing", "2"),
    ],
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_the_memory_of_a_step_is_estimated_within_15_percent(
    options: list[str], longer: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    words = ["--data.batch_size", "6", "--data.layout", "shared_prefix", "--data.validation", "null"]
    words += ["--model.lora.r", "4", *options]
    found = estimated(*longer, tmp_path, words)
    assert found.total - found.libraries == pytest.approx(taken(*longer, tmp_path, words), rel=0.15)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_alive_behind_the_forward_pass_is_what_autograd_keeps(
    checkpointing: bool, longer: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    options = ["--model.lora.r", "4", "--model.gradient_checkpointing", str(checkpointing).lower()]
    dry, _ = dry_run(*longer, tmp_path, options)
    batch = dry.batch(range(4))
    with LiveBytes() as live:
        loss = dry.loss(batch)
    assert loss.requires_grad
    assert live.now == pytest.approx(saved_bytes(lambda: dry.loss(batch), dry.module.policy), rel=0.15)


def test_at_the_peak_activations_gradients_and_the_optimizers_own_are_not_all_there() -> None:
    held = Memory(weights=1000, reference=0, gradients=100, optimizer=200, activations=0, head=0, libraries=0)
    given = {"accumulates": False}

    def peak(most: tuple[int, ...], arrived: tuple[int, ...], step: int = 0, **changed: object) -> tuple[int, int]:
        found = at_peak(held, Counted(1, most, arrived), step, **(given | changed))
        assert (found.weights, found.optimizer) == (1000, 200)
        return found.gradients, found.activations

    # forward; up to a first gradient of 40; up to a second one of 60; behind it
    assert peak((500, 550, 300, 100), (0, 0, 40, 100)) == (100, 500)  # the step before left its gradients
    assert peak((500, 650, 300, 100), (0, 0, 40, 100)) == (0, 650)
    assert peak((500, 550, 680, 100), (0, 0, 40, 100)) == (40, 640)
    assert peak((500, 550, 300, 100), (0, 0, 40, 100), step=900) == (100, 900)
    assert peak((500, 550, 300, 100), (0, 0, 0, 0), accumulates=True) == (100, 550)
    tenth = Share(processes=10, gradients=0.1, optimizer=0.1)
    assert peak((500, 595, 300, 100), (0, 0, 40, 100), share=tenth) == (0, 595)
    assert peak((500, 595, 300, 100), (0, 0, 40, 100), step=5000, share=tenth) == (0, 595)  # on a tenth, too
    # 200 more in the backward pass, before each has its part: the moment at which 40 of 100 are there
    assert peak((590, 400, 500, 100), (0, 0, 40, 100), share=tenth._replace(undivided=200)) == (40, 460)


def test_holes_are_a_bound_beside_the_sum_and_only_on_a_cpu() -> None:
    needed = {"weights": 1000, "reference": 0, "gradients": 100, "optimizer": 200, "activations": 650, "head": 0}
    of_cpu, of_gpu = (library_bytes(torch.device(name)) for name in ("cpu", "cuda"))
    assert of_gpu == 0 and Memory(**needed, libraries=of_gpu).holes == 0
    found = Memory(**needed, libraries=of_cpu)
    assert found.total == 1950 + of_cpu
    assert 0.91 * found.total < found.holes < found.total  # the most that experiments/LOG.md has


@pytest.mark.parametrize("options", [[], ["--data.layout", "shared_prefix"], ["--data.length_window", "2"]])
def test_the_largest_micro_batch_is_that_of_the_run(
    options: list[str], longer: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    dry, planned = dry_run(*longer, tmp_path, [*options, "--data.batch_size", "5", "--trainer.max_epochs", "2"])
    datamodule, sizes = dry.datamodule, []
    for epoch in (0, 1):
        batches = datamodule.training_batches(0, 1)
        batches.set_epoch(epoch)
        sizes += [dry.batch([slot.index for slot in slots]).model_input.input_ids.numel() for slots in batches]
    assert len(sizes) == planned.steps == 8
    costs = TokenCosts.of(dry.dataset.pairs, datamodule.layout)
    assert most_tokens(datamodule, costs, planned) == max(sizes)
    fewer = replace(costs, widths=costs.widths[:3])  # a sample smaller than a batch: as if its longest came again
    expected = [max(fewer.widths)] * 10 if costs.padded else [*fewer.widths, *sorted(fewer.widths)[:0:-1]]
    assert most_tokens(datamodule, fewer, planned) == sum(expected)


def test_a_step_that_cannot_fit_is_not_tried(
    longer: tuple[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dry, planned = dry_run(*longer, tmp_path, [])
    tried, batch = [], DryRun.batch
    monkeypatch.setattr(DryRun, "batch", lambda self, rows: tried.append(rows) or batch(self, rows))
    held = dry.memory(planned, 1)
    assert held.total > 1 and held.activations == 0 and tried == []
    assert dry.memory(planned, held.total + 1).total > held.total + 1
    assert [len(rows) for rows in tried] == [1, 2]  # short pairs; the longest one is left out
    tried.clear()
    dry.memory(planned, ENOUGH)
    assert len(tried) == 3


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("pairs_that_fill_a_chunk", [1, 3, 100])
def test_the_head_takes_no_more_from_the_first_full_chunk_on(
    pairs_that_fill_a_chunk: int,
    alike: bool,
    longer: tuple[str, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, data = longer
    if alike:  # then two of the shortest pairs have more tokens than the longest
        data = data | {"train": str(write_rows(tmp_path / "alike.jsonl", tiny_rows(24)))}
    dry, planned = dry_run(model, data, tmp_path, ["--data.batch_size", "6", "--data.layout", "packed"])
    costs, pairs = TokenCosts.of(dry.dataset.pairs, "packed"), dry.dataset.pairs
    shortest, *_, longest = sorted(range(len(pairs)), key=costs.widths.__getitem__)
    assert (2 * costs.widths[shortest] >= costs.widths[longest]) is alike
    chunk = pairs_that_fill_a_chunk * (len(pairs[longest].chosen) + len(pairs[longest].rejected)) - 1

    def law(_: DryRun, rows: list[int], accumulates: bool) -> Counted:
        positions = sum(len(pairs[row].chosen) + len(pairs[row].rejected) for row in rows)
        return Counted(costs.total(rows), (100 * costs.total(rows) + 10_000 * min(positions, chunk),), (0,))

    monkeypatch.setattr(DryRun, "_count", law)
    monkeypatch.setitem(logps.CHUNK_ELEMENTS, "cpu", chunk * dry.module.policy.model.config.vocab_size)
    found = dry.memory(planned, ENOUGH).activations
    most = most_tokens(dry.datamodule, costs, planned)
    if pairs_that_fill_a_chunk < 6:
        assert found == pytest.approx(100 * most + 10_000 * chunk, abs=2)  # whole bytes
    else:  # no chunk is ever full: both grow with the tokens
        short, long = (law(dry, rows, False) for rows in ([shortest], [longest] * (2 if alike else 1)))
        slope = (long.most[0] - short.most[0]) / (long.tokens - short.tokens)
        assert found == pytest.approx(long.most[0] + slope * (most - long.tokens), abs=2)


def test_memory_that_does_not_suffice_stops_the_run_and_says_what_helps() -> None:
    (finding,) = memory_findings(11, 10, lora=False, checkpointing=False, batch_size=8)
    assert finding.level == "fails"
    for change in ("gradient_checkpointing", "batch_size below 8", "model.lora", "max_prompt_length"):
        assert change in finding.change
    (finding,) = memory_findings(11, 10, lora=True, checkpointing=True, batch_size=1)
    assert "lora" not in finding.change and "checkpointing" not in finding.change
    assert memory_findings(5, 10, lora=True, checkpointing=True, batch_size=1) == []
    free = 10 * 2**20
    (finding,) = memory_findings(free // 2, free, lora=True, checkpointing=True, batch_size=1, holes=6 * 2**20)
    assert finding.level == "note" and "MALLOC_MMAP_THRESHOLD_" in finding.change
    assert "about 5 MiB (with holes in the heap up to 11 MiB), and 10 MiB are free" in finding.problem


SHARDED = ["--trainer.strategy", "lightning.pytorch.strategies.ModelParallelStrategy", "--trainer.devices", "2"]
SHARDED += ["--trainer.strategy.data_parallel_size", "2", "--trainer.strategy.tensor_parallel_size", "1"]


def test_processes_that_share_the_weights_hold_what_the_table_of_the_experiments_says() -> None:
    of_table = scaling.memory(scaling.Run(model=scaling.LLAMA_8B, gpus=8))
    sizes = scaling.LLAMA_8B
    config = LlamaConfig(
        vocab_size=sizes.vocabulary, hidden_size=sizes.hidden, intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads,
    )  # fmt: skip
    with torch.device("meta"):
        scorer = CompletionScorer(LlamaForCausalLM(config))
    parameters = list(scorer.parameters())
    weights, state = parameter_bytes(parameters), optimizer_bytes(torch.optim.AdamW, parameters)
    whole = Memory(weights, 0, weights, state, activations=5, head=6, libraries=7)
    each = whole.shared(even_share(scorer, None, "bf16-mixed", 8))
    for name in ("weights", "gradients", "optimizer", "gathered"):
        assert getattr(each, name) == pytest.approx(getattr(of_table, name), rel=1e-6), name
    assert (each.activations, each.head, each.libraries) == (5, 6, 7)


STRATEGY = "--trainer.strategy"
UNSHARDABLE: dict[str, tuple[list[str], str]] = {
    "tensor parallel": (
        [f"{STRATEGY}.data_parallel_size", "1", f"{STRATEGY}.tensor_parallel_size", "2"],
        "tensor_parallel_size=2, weights are sharded over the data-parallel processes only; give tensor_parallel_size: "
        "1 and data_parallel_size: 2",
    ),
    "tensor parallel by default": ([f"{STRATEGY}.tensor_parallel_size", "auto"], "tensor_parallel_size=2, weights are"),
    "another number of processes": (
        [f"{STRATEGY}.data_parallel_size", "8"],
        "trainer.strategy.data_parallel_size=8 is not allowed; allowed: 2, the number of all processes",
    ),
    "4 bits": (
        ["--model.policy.quantization", "nf4", "--model.lora.r", "4"],
        "quantization=nf4 does not work with ModelParallelStrategy",
    ),
}


@pytest.mark.parametrize("case", UNSHARDABLE)
def test_what_cannot_be_sharded_is_refused_as_the_run_would(
    case: str, inspect: Inspect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gamma_po.policies.find_spec", lambda name: name)  # bitsandbytes need not be there
    options, message = UNSHARDABLE[case]
    status, text = inspect(*SHARDED, *options)
    assert status == 1 and message in text.split("error: ")[1]


def test_an_optimizer_that_cannot_update_shared_weights_is_refused_as_the_run_would(inspect: Inspect) -> None:
    pytest.importorskip("bitsandbytes")
    status, text = inspect(*SHARDED, "--model.optimizer", "bitsandbytes.optim.AdamW8bit")
    assert status == 1 and "does not work with ModelParallelStrategy: bitsandbytes cannot" in text


FLAT = ["--trainer.strategy", "tests.integration.test_flat_sharding.FSDPStrategyOnCPU", "--trainer.devices", "2"]
FLAT += ["--trainer.strategy.state_dict_type", "full"]


@pytest.mark.parametrize("strategy", [SHARDED, FLAT], ids=["fsdp2", "fsdp1"])
@pytest.mark.parametrize("fits", [True, False])
def test_a_sharded_run_is_judged_by_what_one_process_holds(
    fits: bool, strategy: list[str], inspect: Inspect, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sum(p.numel() for p in tiny_model().parameters()) * 4
    free = 2**30 if fits else model - 1
    monkeypatch.setattr("gamma_po.commands.inspect.free_memory", lambda device: free)
    status, text = inspect(*strategy)
    assert "memory of each of 2 processes" in text
    assert ("ref_acc, raw" in text) == ("measured on one process" in text) == fits
    assert ("the whole model does not fit into one process here" in text) is not fits
    lacking = r"in each of 2 processes \(with holes in the heap up to \d+ MiB\), and 0 MiB are free"
    assert bool(re.search(lacking, text)) is not fits
    assert status == (0 if fits else 1)
