"""However a step's pairs are cut into forwards, micro-batches and ranks, its gradient is that of one big batch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor

from gamma_po.data.datamodule import PreferenceDataModule
from gamma_po.data.dataset import PairDataset, Slot, collate, cut_by_tokens
from gamma_po.errors import ConfigError, DataError
from gamma_po.forwards import score
from gamma_po.layouts import LAYOUTS
from gamma_po.losses import DPO, KTOPair, Loss
from gamma_po.margins import KL, Margin, NoMargin
from gamma_po.module import PreferenceModule
from gamma_po.policies import Lora, ModelConfig, load_model
from gamma_po.types import ModelInput, PairLogps, PreferenceBatch
from tests.contracts import assert_same_step, gradient_vector, perturb, tiny_dataset
from tests.integration.test_ranks import flat_weights
from tests.processes import two_processes
from tests.runs import arguments, fit, steps_of
from tests.tiny import tiny_rows, write_rows

ROWS = range(12)
LIMIT = 150  # tokens; a pair takes 20 to 60
LORA = Lora(r=4, alpha=8, target_modules=["q_proj", "v_proj"])
WEIGHT_TOLERANCE = 1e-5  # relative L2 of the change in training
SGD = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1", "--model.schedule", "constant"]
SGD += [
    "--trainer.limit_val_batches",
    "0",
    "--model.warmup_ratio",
    "0",
    "--model.margin",
    "NoMargin",
    "--model.loss.beta",
    "0.3",
]


def batch_of(dataset: PairDataset, layout: str, limit: int | None) -> PreferenceBatch:
    """The rows as one batch, in several forwards where there is a limit."""
    cut = None if limit is None else partial(cut_by_tokens, layout=layout, limit=limit)
    return collate([dataset[Slot(row)] for row in ROWS], pad_id=0, layout=LAYOUTS[layout], cut=cut)


def step(module: PreferenceModule, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    """Loss and gradient vector."""
    module.zero_grad()
    output, _ = module.compute(batch, module.step_state)
    output.loss.backward()
    return output.loss.detach(), gradient_vector([p for p in module.policy.parameters() if p.requires_grad])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize(("loss", "margin"), [(DPO(), KL(tau=0.3)), (KTOPair(), NoMargin())], ids=["kl", "kto_pair"])
def test_a_batch_in_several_forwards_has_the_loss_and_gradient_of_one(
    loss: Loss, margin: Margin, lora: Lora | None, layout: str, tiny_model_path: str, tiny_data: dict[str, str]
) -> None:
    """Also where pairs are coupled, by the margin's pool or by the loss."""
    module = PreferenceModule(ModelConfig(path=tiny_model_path), loss, margin, lora=lora, reference="copy")
    module.configure_model()
    module.train()
    perturb(module)
    dataset = tiny_dataset(tiny_data["train"], flips=(2, 5))
    whole, cut = batch_of(dataset, layout, None), batch_of(dataset, layout, LIMIT)
    assert len(whole.model_inputs) == 1 and len(cut.model_inputs) >= 3
    assert all(rows.input_ids.numel() <= LIMIT for rows in cut.model_inputs)
    assert_same_step(step(module, cut), step(module, whole))


def test_every_field_of_a_cut_batch_belongs_to_its_pair(tiny_data: dict[str, str]) -> None:
    dataset = tiny_dataset(tiny_data["train"], flips=(2, 5))
    dataset.column = torch.arange(32.0)
    dataset.reference = PairLogps(*(torch.arange(32.0) + 100 * i for i in range(4)))
    whole, cut = batch_of(dataset, "padded", None), batch_of(dataset, "padded", LIMIT)
    order = cut.index
    assert sorted(order.tolist()) == list(ROWS) and order.tolist() != list(ROWS)
    for name in ("index", "weight", "flipped", "column"):
        assert torch.equal(getattr(cut, name), getattr(whole, name)[order])
    for ours, theirs in zip(cut.reference, whole.reference, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs[order])
    lengths = torch.cat([rows.lengths.view(2, -1) for rows in cut.model_inputs], dim=1)
    assert torch.equal(lengths, whole.model_input.lengths.view(2, -1)[:, order])
    moved = cut.to("cpu")
    assert len(moved.model_inputs) == len(cut.model_inputs)
    with pytest.raises(ValueError):
        _ = cut.model_input  # nobody may take a part for the whole


def test_only_the_last_forward_keeps_its_activations_and_only_the_others_run_twice(tiny_data: dict[str, str]) -> None:
    """With dropout, a repeated forward must draw what it drew: the gradient is that of the loss that was seen."""
    batch = batch_of(tiny_dataset(tiny_data["train"]), "padded", LIMIT)
    calls: list[int] = []
    weight = torch.tensor(0.7, requires_grad=True)

    def scorer(rows: ModelInput) -> PairLogps:
        calls.append(id(rows))
        noisy = torch.nn.functional.dropout(weight * rows.lengths.float(), 0.5)
        return PairLogps(*noisy.exp().chunk(2), *rows.lengths.chunk(2))

    logps = score(scorer, batch)
    forwards = [id(rows) for rows in batch.model_inputs]
    assert calls == forwards
    total = (logps.chosen + logps.rejected).sum()
    total.backward()
    assert calls == forwards + forwards[-2::-1]
    kept = torch.cat([logps.chosen, logps.rejected]).detach().log()  # weight * length * (0 or 2)
    expected = (kept.exp() * kept / 0.7).sum()
    assert float(weight.grad) == pytest.approx(float(expected), rel=1e-5)
    with torch.no_grad():
        score(scorer, batch)
    assert calls[2 * len(forwards) - 1 :] == forwards


def ended_at(model: str, data: dict[str, str], root: Path, options: list[str]) -> Tensor:
    """The trained weights."""
    return flat_weights(fit(model, data, root, [*SGD, *options]))


def test_a_step_of_token_cut_micro_batches_is_the_step_of_one_big_batch(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    """On one process and on two; also where the epoch's last step is short of micro-batches."""
    begin = load_model(ModelConfig(path=tiny_model_path)).state_dict()
    untrained = torch.cat([begin[name].flatten().double() for name in sorted(begin)])
    window = ["--data.length_window", "1"]
    sixteen = ended_at(tiny_model_path, tiny_data, tmp_path, ["--data.batch_size", "16"])

    def assert_close(ours: Tensor, theirs: Tensor) -> None:
        assert float((ours - theirs).norm() / (theirs - untrained).norm()) < WEIGHT_TOLERANCE

    cut = [*window, "--data.batch_size", "4", "--trainer.accumulate_grad_batches", "4"]
    assert_close(ended_at(tiny_model_path, tiny_data, tmp_path, cut), sixteen)
    both = [*window, "--data.batch_size", "2", "--trainer.accumulate_grad_batches", "4"]
    both += ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.max_tokens_per_forward", str(LIMIT)]
    two_processes(["-m", "gamma_po", "fit", *arguments(tiny_model_path, tiny_data, tmp_path / "two", [*SGD, *both])])
    (folder,) = (tmp_path / "two" / "runs" / "run").iterdir()
    assert_close(flat_weights(folder), sixteen)
    short = [*window, "--data.limit_train", "12", "--data.batch_size", "4", "--trainer.accumulate_grad_batches", "5"]
    twelve = ended_at(tiny_model_path, tiny_data, tmp_path, ["--data.limit_train", "12", "--data.batch_size", "12"])
    assert_close(ended_at(tiny_model_path, tiny_data, tmp_path, short), twelve)


@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
def test_micro_batches_of_different_numbers_of_pairs_weigh_each_pair_alike(
    layout: str, tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tiny_rows(32, seed=3)
    for row in rows[::8]:
        row["chosen"] = " ".join([row["chosen"]] * 12)  # one of eight is so long that few others fit beside it
    file, sizes, step = str(write_rows(tmp_path / "rows.jsonl", rows)), [], PreferenceModule.training_step

    def counting(module: PreferenceModule, batch: PreferenceBatch, number: int) -> dict[str, object]:
        sizes.append(batch.num_pairs)
        return step(module, batch, number)

    monkeypatch.setattr(PreferenceModule, "training_step", counting)
    data, options = dict.fromkeys(("train", "validation", "test"), file), ["--data.layout", layout]
    whole = ended_at(tiny_model_path, data, tmp_path / "whole", [*options, "--data.batch_size", "16"])
    assert set(sizes) == {16}
    sizes.clear()
    options += ["--data.length_window", "1", "--data.batch_size", "4", "--trainer.accumulate_grad_batches", "4"]
    cut = ended_at(tiny_model_path, data, tmp_path / "cut", options)
    assert sum(sizes) == 32 and len(set(sizes)) > 1
    begin = load_model(ModelConfig(path=tiny_model_path)).state_dict()
    change = whole - torch.cat([begin[name].flatten().double() for name in sorted(begin)])
    assert float((cut - whole).norm() / change.norm()) < WEIGHT_TOLERANCE


def test_a_limit_on_tokens_changes_no_loss_of_a_run_with_a_kl_margin(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options = ["--data.batch_size", "8", "--model.margin.tau", "0.3", *SGD[:4]]
    runs = [
        fit(tiny_model_path, tiny_data, tmp_path, [*options, *limit])
        for limit in ([], ["--data.max_tokens_per_forward", str(LIMIT)])
    ]
    for column in ("train/loss", "val/loss"):
        expected = steps_of(runs[0], column)
        assert expected and steps_of(runs[1], column) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--data.max_tokens_per_forward", "30"], DataError, r"train.jsonl, row \d+ .*: the pair alone takes \d+ tok"),
        (
            ["--data.length_window", "1", "--trainer.callbacks", "GradientAccumulationScheduler",
             "--trainer.callbacks.scheduling", "{1: 2}"],
            ConfigError,
            "GradientAccumulationScheduler does not work here",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused_before_training(
    options: list[str], error: type[Exception], message: str,
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises(error, match=message):
        fit(tiny_model_path, tiny_data, tmp_path, options)


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_forwards_of_sharded_weights_are_not_cut(strategy: type) -> None:
    datamodule = PreferenceDataModule(train="never read", max_tokens_per_forward=900)
    datamodule.tokenizer, datamodule.trainer = object(), SimpleNamespace(strategy=strategy())
    with pytest.raises(ConfigError, match=f"data.max_tokens_per_forward=900 does not work with {strategy.__name__}"):
        datamodule.setup("fit")
