"""`evaluate` counts what implicit rewards get right, by subset, and leaves win rates to alpaca-eval."""

from __future__ import annotations

import io
import json
import math
import random
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gamma_po.__main__ import main
from gamma_po.commands import evaluate as evaluating
from gamma_po.evaluation.pair_scores import opened_reference, reference_name
from gamma_po.evaluation.subsets import SECTIONS, accuracy_table, section_accuracies, subset_accuracies
from gamma_po.saved import SavedPolicy, open_policy
from tests.runs import run
from tests.tiny import tiny_model, tiny_rows, tiny_tokenizer, write_rows

LORA = ["--model.lora.r", "4", "--model.lora.alpha", "8", "--model.optimizer.lr", "0.03"]
TOLERANCE = 1e-6  # shares of a few pairs


def test_accuracies_are_those_of_log_probabilities_computed_one_by_one(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    finished = run("fit", tiny_model_path, tiny_data, tmp_path, LORA)
    rows = [{**row, "subset": "ab"[i % 3 == 0]} for i, row in enumerate(tiny_rows(10, seed=5))]
    pairs, output = write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "out.json"
    command = ["evaluate", "--policy", str(finished.trainer_dir), "--pairs", str(pairs), "--subset", "subset"]
    assert main([*command, "--output", str(output)]) == 0
    model, tokenizer = finished.cli.model.policy.model.eval(), tiny_tokenizer()

    def logp(prompt: str, completion: str) -> tuple[float, int]:
        message = [{"role": "user", "content": prompt}]
        before = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        head, tail = tokenizer(before).input_ids, [*tokenizer(completion).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logps = model(torch.tensor([head + tail])).logits[0].double().log_softmax(-1)
        return sum(float(logps[len(head) - 1 + i, token]) for i, token in enumerate(tail)), len(tail)

    hits: dict[str, list[dict[str, bool]]] = {"a": [], "b": []}
    for row in rows:
        (chosen, n), (rejected, m) = logp(row["prompt"], row["chosen"]), logp(row["prompt"], row["rejected"])
        with model.disable_adapter():
            (old_chosen, _), (old_rejected, _) = (logp(row["prompt"], row[side]) for side in ("chosen", "rejected"))
        hits[row["subset"]].append(
            {
                "log_ratio": chosen - old_chosen > rejected - old_rejected,
                "mean_log_ratio": (chosen - old_chosen) / n > (rejected - old_rejected) / m,
                "logp": chosen > rejected,
                "mean_logp": chosen / n > rejected / m,
            }
        )
    found = {row["name"]: row for row in json.loads(output.read_text())["accuracies"]}
    for reward in ("log_ratio", "mean_log_ratio", "logp", "mean_logp"):
        shares = {name: sum(hit[reward] for hit in hits[name]) / len(hits[name]) for name in hits}
        for name, share in shares.items():
            assert found[name]["accuracy"][reward]["mean"] == pytest.approx(share, abs=TOLERANCE)
        mean = sum(shares.values()) / 2
        assert found["mean over subsets"]["accuracy"][reward] == pytest.approx(mean, abs=TOLERANCE)
    assert found["all pairs"]["num_pairs"] == 10


def test_a_whole_model_needs_its_reference_named_or_left_out(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--policy", tiny_model_path, "--pairs", tiny_data["test"]]
    assert main(command) == 2
    assert "name it with --reference PATH" in capsys.readouterr().err
    output = tmp_path / "out.json"
    assert main([*command, "--reference", tiny_model_path, "--output", str(output)]) == 0
    (row,) = json.loads(output.read_text())["accuracies"]
    assert row["accuracy"]["log_ratio"]["mean"] == 0.5  # the policy is its reference: all ties
    assert main([*command, "--reference_free", "--output", str(tmp_path / "free.json")]) == 0
    (row,) = json.loads((tmp_path / "free.json").read_text())["accuracies"]
    assert set(row["accuracy"]) == {"logp", "mean_logp"}


def test_the_reference_of_a_run_is_the_one_it_was_trained_against_wherever_the_policy_lies(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tiny_model_path, tmp_path / "other"))
    tiny_model(seed=1).save_pretrained(other)
    finished = run("fit", tiny_model_path, tiny_data, tmp_path, [*LORA, "--model.reference_model.path", str(other)])
    ids = torch.arange(9)[None]
    elsewhere = shutil.copytree(finished.trainer_dir / "policy", tmp_path / "elsewhere")
    for place in (finished.trainer_dir, finished.trainer_dir / "checkpoints" / "last.ckpt", elsewhere):
        with opened_reference(open_policy(SavedPolicy(path=str(place))), None) as reference, torch.no_grad():
            torch.testing.assert_close(reference(ids).logits, tiny_model(seed=1)(ids).logits)
        assert reference_name(open_policy(SavedPolicy(path=str(place))), None) == str(other)
    (elsewhere / "gamma_po.json").unlink()  # as adapters of earlier versions, and of other programs: nothing of a run
    name = reference_name(open_policy(SavedPolicy(path=str(elsewhere))), None)
    assert name.startswith("the policy without its adapter; the adapter lies outside of its run")


def test_numbers_are_written_into_a_new_file_only_and_that_is_said_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "out.json"
    there.write_text("someone's")
    command = ["evaluate", "--policy", "/no/such/model", "--pairs", "/no/such.jsonl", "--output"]
    for output, says in ((there, "nothing is replaced"), (there / "a.json", f"{there} is no folder")):
        assert main([*command, str(output)]) == 2
        assert says in capsys.readouterr().err
    assert there.read_text() == "someone's"


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"chosen": ""}, [], "chosen is empty; `invalid_rows: drop` would drop such rows"),
        ({}, ["--tokenization.max_prompt_length", "0"], "error: tokenization.max_prompt_length=0 is not allowed"),
        (
            {},
            ["--columns.margin_minus", "x"],
            "error: columns.margin_minus='x' is not allowed; allowed: null, as columns.",
        ),
        ({"subset": None}, ["--subset", "subset"], "column 'subset' holds null; allowed: the name of a subset"),
        ({}, ["--reference_free", "--reference", "/no/such"], "--reference_free does not use --reference"),
    ],
)
def test_what_is_wrong_with_pairs_is_told_by_this_commands_own_options(
    row: dict[str, object], options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = write_rows(tmp_path / "p.jsonl", [{**tiny_rows(1)[0], **row}])
    try:
        status = main(["evaluate", "--policy", "/no/such/model", "--pairs", str(pairs), *options])
    except SystemExit as end:
        status = end.code
    error = capsys.readouterr().err
    assert status == 2 and message in error and "data." not in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("options", "template", "beginning"),
    [
        ([], "text", "the"),
        (["--template", "chat"], "chat", "<|im_start|>"),
        (["--tokenization.template", "chat"], "chat", "<|im_start|>"),
        (["--template", "auto"], "auto", "<|im_start|>"),
    ],
)
def test_pairs_become_text_as_in_the_policys_run_unless_said_otherwise(
    options: list[str],
    template: str,
    beginning: str,
    tiny_model_path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Path(shutil.copytree(tiny_model_path, tmp_path / "run" / "policy")).parent
    (folder / "config.yaml").write_text("data: {tokenization: {template: text}}\n")
    (folder / "run.json").write_text("{}")
    pairs = write_rows(tmp_path / "p.jsonl", [{"prompt": "the cat", "chosen": "good", "rejected": "bad"}])
    seen, pair_logps, output = [], evaluating.pair_logps, tmp_path / "out.json"

    def recorded(model: object, pairs: list, *args: object) -> object:
        seen.append(tiny_tokenizer().decode(pairs[0].prompt))
        return pair_logps(model, pairs, *args)

    monkeypatch.setattr(evaluating, "pair_logps", recorded)
    command = ["evaluate", "--policy", str(folder), "--pairs", str(pairs), "--reference_free", "--output", str(output)]
    assert main([*command, *options]) == 0
    assert seen[0].startswith(beginning) and "the cat" in seen[0]
    assert json.loads(output.read_text())["settings"]["template"] == template


def test_two_different_templates_are_refused(
    tiny_model_path: str, tiny_data: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--policy", tiny_model_path, "--pairs", tiny_data["test"], "--reference_free"]
    assert main([*command, "--template", "chat", "--tokenization.template", "text"]) == 2
    assert "template='chat' is not allowed" in (error := capsys.readouterr().err) and "text, as token" in error


def margins(*values: float) -> dict[str, torch.Tensor]:
    """Margins under one reward."""
    return {"logp": torch.tensor(values)}


def test_rewardbenchs_sections_weigh_mathematics_as_much_as_code() -> None:
    names = ["math-prm"] * 2 + ["hep-cpp"] * 3 + ["hep-go"] + ["donotanswer"] * 2
    rows = subset_accuracies(margins(1, 1, -1, -1, -1, 1, 1, -1), names, list(range(8)))
    found = {row.name: row.accuracy["logp"] for row in rows}
    assert found["Reasoning"] == pytest.approx((4 * 1.0 + 3 * 0.0 + 1 * 1.0) / 8)  # code has four pairs
    assert found["Safety"] == pytest.approx(0.5)
    assert found["mean over sections"] == pytest.approx((5 / 8 + 0.5) / 2)
    assert found["mean over subsets"] == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert found["all pairs"].mean == pytest.approx(4 / 8)


def test_the_table_fits_into_a_terminal_and_breaks_no_name_and_no_number() -> None:
    names = [name for section in SECTIONS.values() for name in section]
    four = {name: torch.ones(len(names)) for name in ("log_ratio", "mean_log_ratio", "logp", "mean_logp")}
    console = Console(width=80, file=io.StringIO())
    console.print(accuracy_table(subset_accuracies(four, names, list(range(len(names))))))
    text = console.file.getvalue()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and all(name in text for name in [*names, "mean over sections"])
    assert sum(line.split()[1:] == ["1", *["1.000"] * 4] for line in lines) == len(names)
    assert sum(line.split() == ["0.207-1.000"] * 4 for line in lines) == len(names)  # Wilson's, of one pair


def test_subsets_of_ones_own_have_no_sections() -> None:
    rows = subset_accuracies(margins(1, -1), ["mine", "donotanswer"], [0, 1])
    assert section_accuracies(rows[:2]) == []
    assert [row.name for row in rows] == ["mine", "donotanswer", "mean over subsets", "all pairs"]


def annotation(index: int, preference: float | None = 1.5) -> dict[str, object]:
    """One of a judge's annotations."""
    return {
        "instruction": f"question {index}", "preference": preference, "output_1": "a", "output_2": "b",
        "generator_1": "baseline", "generator_2": "mine", "annotator": "judge",
    }  # fmt: skip


def test_win_rates_are_what_alpaca_eval_makes_of_all_annotations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, metrics, seen = types.ModuleType("alpaca_eval"), types.ModuleType("alpaca_eval.metrics"), []
    package.__spec__ = types.SimpleNamespace()

    def rate(annotations: list[dict[str, object]], save_weights_dir: str | None) -> dict[str, float]:
        assert save_weights_dir is None  # nothing is written into the package
        seen.extend(annotations)
        return {"win_rate": 51.5, "length_controlled_winrate": 49.25}

    metrics.get_length_controlled_winrate = rate
    monkeypatch.setitem(sys.modules, "alpaca_eval", package)
    monkeypatch.setitem(sys.modules, "alpaca_eval.metrics", metrics)
    file, output = tmp_path / "annotations.json", tmp_path / "out.json"
    file.write_text(json.dumps([annotation(i) for i in range(805)]))
    assert main(["evaluate", "--annotations", str(file), "--output", str(output)]) == 0
    assert json.loads(output.read_text()) == {"win_rate": 51.5, "length_controlled_winrate": 49.25}
    assert [row["instruction"] for row in seen] == [f"question {i}" for i in range(805)]


@pytest.mark.filterwarnings("ignore")  # the package's own, of setuptools and scikit-learn
def test_the_real_package_takes_the_effect_of_length_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    glm = pytest.importorskip("alpaca_eval.metrics.glm_winrate", reason="needs alpaca-eval (the extra `judges`)")
    generator = torch.Generator().manual_seed(0)
    difficulty, gamed, ours = torch.randn(3, 805, generator=generator).tolist()
    longer = [random.Random(i).randint(-100, 300) for i in range(805)]  # characters
    preferences = [1 + 1 / (1 + math.exp(-n / 100)) for n in longer]  # the judge likes length and nothing else
    lines = [f"a,{i},{ours[i] % 1},{gamed[i]},{difficulty[i]},False" for i in range(805)]
    header = "model,index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline"
    (tmp_path / "df_gamed.csv").write_text("\n".join([header, *lines]))
    monkeypatch.setattr(glm, "hf_hub_download", lambda **_: str(tmp_path / "df_gamed.csv"))
    rows = [
        {**annotation(i, preferences[i]), "index": i, "output_1": "a" * 400, "output_2": "a" * (400 + longer[i])}
        for i in range(805)
    ]
    file, output = tmp_path / "annotations.json", tmp_path / "out.json"
    file.write_text(json.dumps(rows))
    assert main(["evaluate", "--annotations", str(file), "--output", str(output)]) == 0
    rates = json.loads(output.read_text())
    assert rates["win_rate"] == pytest.approx(100 * (sum(preferences) / 805 - 1))
    assert rates["win_rate"] > 65 and abs(rates["length_controlled_winrate"] - 50) < 5


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"preference": 1}], [], "no column 'output_1'; columns there: preference"),
        ([annotation(0, 3.0)], [], "column 'preference' must hold a number in [1, 2]"),
        ([annotation(0), {**annotation(1), "generator_2": "other"}], [], "names several models (mine, other)"),
        ([annotation(0)], ["--pairs", "x.jsonl"], "give either --pairs"),
        ([annotation(0)], ["--policy", "x"], "--annotations does not use --policy"),
        ([annotation(0)], ["--limit", "3", "--reference_free"], "does not use --reference_free, --limit"),
        ([annotation(0)], ["--tokenization.max_prompt_length", "9"], "--annotations does not use --tokenization"),
    ],
)
def test_annotations_that_mean_nothing_are_refused(
    rows: list[dict[str, object]],
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(rows))
    assert main(["evaluate", "--annotations", str(file), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


def test_a_pair_without_its_subset_is_named(
    tiny_model_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**tiny_rows(1)[0], "subset": "a"}, tiny_rows(1)[0]]
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    assert main(["evaluate", "--policy", tiny_model_path, "--pairs", str(pairs), "--subset", "subset"]) == 2
    assert f"{pairs}, row 2 (line 2): no column 'subset'" in capsys.readouterr().err
