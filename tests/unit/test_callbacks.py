"""Callbacks in real (tiny) fits: what is written and logged is what the module computed."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gamma_po.callbacks import GammaStatistics, MarginHistograms, NonFiniteGuard, PairRecorder, RunPlots
from gamma_po.callbacks.gamma_statistics import BATCHES_ON_DEVICE, PairCollector
from gamma_po.callbacks.monitors import LearningRate, Throughput, pairs_and_tokens
from gamma_po.callbacks.pair_recorder import write_parquet
from gamma_po.callbacks.plots import VALIDATION_KEYS
from gamma_po.errors import ConfigError
from gamma_po.layouts import LAYOUTS
from gamma_po.margins import build_margin
from gamma_po.ranks import Local, Ranks
from gamma_po.types import Evidence, LossOutput, ModelInput, PairLogps, PairRewards, PreferenceBatch

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    # Lightning 2.6 with torch 2.13
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]

FLOAT32 = 1e-6
ROWS, PADDING = 11, 10  # row 10 only pads: weight 0
BATCH = 4


class TwoRanks(Local):
    """This process, and a second rank that always sends the same rows."""

    world_size = 2

    def __init__(self, other: Tensor) -> None:
        self.other = other

    def all_gather(self, values: Tensor) -> Tensor:
        return torch.cat([values, self.other])


class Policy(LightningModule):
    """Two weights, honouring what callbacks may expect of a preference module."""

    def __init__(
        self,
        *,
        ranks: Ranks | None = None,
        spoil: Callable[[LossOutput, Tensor], LossOutput] | None = None,
        with_reference: bool = True,
    ) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([0.1, -0.2]))
        self.policy = None  # no model whose weights could be sharded
        self.ranks = ranks or Local()
        self.margin = SimpleNamespace(gamma0=3.0, tau=4.0)
        self.spoil = spoil or (lambda output, index: output)
        self.with_reference = with_reference
        self.seen: list[dict[str, Any]] = []

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> dict[str, Any]:
        output = self.spoil(self.compute(batch), batch.index)
        self.last_output, self.last_batch = output._replace(loss=output.loss.detach()), batch
        self.seen.append({"epoch": self.current_epoch, "batch": batch, "output": self.last_output})
        return {"loss": output.loss, "output": self.last_output}

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> dict[str, Any]:
        output = self.compute(batch)
        values = {"val/loss": output.loss, "val/rewards/margins": output.rewards.margin.mean()}
        self.log_dict(values, batch_size=batch.num_pairs)
        return {"output": output}

    def compute(self, batch: PreferenceBatch) -> LossOutput:
        features = torch.stack([torch.sin(batch.index + 1.0), torch.cos(2.0 * batch.index)], dim=1)
        score = features @ self.weights
        lengths = torch.full_like(batch.index, 7)
        policy = PairLogps(score - 5, -2 * score - 6, lengths, lengths + 1)
        zeros = torch.zeros_like(score)
        reference = PairLogps(zeros - 5, zeros - 6, lengths, lengths + 1)
        rewards = PairRewards(0.5 * (policy.chosen + 5), 0.5 * (policy.rejected + 6))
        gamma = 1 + torch.tanh(rewards.margin).detach()
        per_pair = nn.functional.softplus(gamma - rewards.margin)
        evidence = Evidence(policy.detach(), reference if self.with_reference else None)
        return LossOutput(
            loss=(per_pair * batch.weight).sum() / batch.weight.sum(),
            per_pair=per_pair.detach(),
            rewards=PairRewards(*(side.detach() for side in rewards)),
            target_margin=gamma,
            gradient_weight=torch.sigmoid(gamma - rewards.margin).detach(),
            evidence=evidence,
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def collate(rows: list[int]) -> PreferenceBatch:
    index, empty = torch.tensor(rows), torch.zeros(len(rows), dtype=torch.long)
    return PreferenceBatch(
        model_inputs=(ModelInput(*[empty] * 7),),
        index=index,
        weight=(index != PADDING).float(),
        flipped=index % 3 == 0,
    )


def loader() -> DataLoader:
    return DataLoader(range(ROWS), batch_size=BATCH, collate_fn=collate)


def fit(tmp_path: Path, callbacks: list, module: Policy | None = None, **options: Any) -> tuple[Policy, Trainer]:
    """Three batches (4, 4 and 2 pairs that count) per epoch, with both loggers."""
    module = module or Policy()
    validate = options.pop("validate", False)
    checkpoint = options.pop("ckpt_path", None)
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tensorboard")]
    settings = {
        "max_epochs": 2,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 1.0 if validate else 0,
        **options,
    }
    trainer = Trainer(
        accelerator="cpu",
        logger=loggers,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **settings,
    )
    trainer.fit(module, loader(), loader(), ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    return module, trainer


def counted(module: Policy, field: Callable[[LossOutput], Tensor], steps: slice = slice(None)) -> np.ndarray:
    """A field of all pairs that count, in the order in which they were trained on."""
    parts = [field(s["output"])[s["batch"].index != PADDING] for s in module.seen[steps]]
    return torch.cat(parts).double().numpy()


def gamma_of(output: LossOutput) -> Tensor:
    return output.target_margin


def reward_margin_of(output: LossOutput) -> Tensor:
    return output.rewards.margin


def logged_rows(trainer: Trainer, key: str) -> list[float]:
    with open(Path(trainer.log_dir) / "metrics.csv") as file:
        return [float(row[key]) for row in csv.DictReader(file) if row.get(key)]


class TestGammaStatistics:
    def test_each_epoch_logs_the_statistics_of_its_pairs(self, tmp_path: Path) -> None:
        module, trainer = fit(tmp_path, [GammaStatistics()])
        for epoch in range(2):
            steps = slice(3 * epoch, 3 * epoch + 3)
            gamma, reward_margin = counted(module, gamma_of, steps), counted(module, reward_margin_of, steps)
            weight = counted(module, lambda output: output.gradient_weight, steps)
            expected = {
                "mean": gamma.mean(),
                "std": gamma.std(),
                "min": gamma.min(),
                "max": gamma.max(),
                "p10": np.percentile(gamma, 10),
                "p50": np.percentile(gamma, 50),
                "p90": np.percentile(gamma, 90),
                "corr": np.corrcoef(gamma, reward_margin)[0, 1],
                "gradient_weight": weight.mean(),
                "strength": 0.75,
            }
            found = {name: logged_rows(trainer, f"train/gamma/{name}")[epoch] for name in expected}
            assert found == pytest.approx(expected, abs=FLOAT32)

    def test_pairs_of_other_ranks_count_too(self, tmp_path: Path) -> None:
        other = torch.tensor([[100.0, 1.0, 0.5], [200.0, 2.0, 0.5]])  # γ, reward margin, gradient weight
        module, trainer = fit(tmp_path, [GammaStatistics()], Policy(ranks=TwoRanks(other)), max_epochs=1)
        gamma = np.concatenate([counted(module, gamma_of), [100.0, 200.0]])
        assert logged_rows(trainer, "train/gamma/mean") == pytest.approx([gamma.mean()], rel=FLOAT32)
        assert logged_rows(trainer, "train/gamma/max") == [200.0]

    def test_a_reversed_margin_has_the_strength_of_its_inner_one(self, tmp_path: Path) -> None:
        module = Policy()
        module.margin = build_margin("reverse", inner=build_margin("kl", gamma0=3.0, tau=2.0))
        _, trainer = fit(tmp_path, [GammaStatistics()], module, max_epochs=1)
        assert logged_rows(trainer, "train/gamma/strength") == [1.5]

    def test_a_margin_without_tau_has_no_strength(self, tmp_path: Path) -> None:
        module = Policy()
        module.margin = SimpleNamespace(gamma0=3.0)
        _, trainer = fit(tmp_path, [GammaStatistics()], module, max_epochs=1)
        assert "train/gamma/mean" in trainer.callback_metrics
        assert "train/gamma/strength" not in trainer.callback_metrics

    def test_pairs_keep_their_order_across_blocks(self) -> None:
        collector, module = PairCollector(), Policy()
        batches = [collate([step % PADDING, PADDING]) for step in range(2 * BATCHES_ON_DEVICE + 3)]
        for batch in batches:
            collector.append(module.compute(batch), batch.weight)
        values = collector.take(Local(), torch.device("cpu"))
        expected = torch.cat([module.compute(batch).target_margin[:1] for batch in batches])
        assert torch.equal(values.target_margin, expected)
        assert collector.take(Local(), torch.device("cpu")).target_margin.shape == (0,)


class TestMarginHistograms:
    def test_every_pair_is_in_exactly_one_histogram(self, tmp_path: Path) -> None:
        histograms = MarginHistograms(every_n_steps=2, bins=5)
        module, _ = fit(tmp_path, [histograms])
        windows = [(0, 2), (2, 3), (3, 4), (4, 6)]  # step 6 is both due and the end of the epoch
        for name, field in (("gamma", gamma_of), ("reward_margin", reward_margin_of)):
            rows = histograms.history[name]
            assert [(row.first_step, row.last_step) for row in rows] == windows
            for row, (first, last) in zip(rows, windows, strict=True):
                values = counted(module, field, slice(first, last))
                counts, _ = np.histogram(values, bins=np.linspace(row.low, row.high, 6))
                assert (row.low, row.high) == pytest.approx((values.min(), values.max()), abs=FLOAT32)
                assert row.counts == counts.tolist()

    def test_zero_steps_means_once_per_epoch(self, tmp_path: Path) -> None:
        histograms = MarginHistograms(every_n_steps=0)
        fit(tmp_path, [histograms])
        assert [(row.first_step, row.last_step) for row in histograms.history["gamma"]] == [(0, 3), (3, 6)]
        assert [sum(row.counts) for row in histograms.history["gamma"]] == [10, 10]

    def test_accumulated_micro_batches_belong_to_their_step(self, tmp_path: Path) -> None:
        histograms = MarginHistograms(every_n_steps=1)
        fit(tmp_path, [histograms], accumulate_grad_batches=2, max_epochs=1)
        rows = histograms.history["gamma"]
        assert [(row.last_step, sum(row.counts)) for row in rows] == [(1, 8), (2, 2)]

    def test_tensorboard_holds_the_same_histograms(self, tmp_path: Path) -> None:
        module, trainer = fit(tmp_path, [MarginHistograms(every_n_steps=2)], max_epochs=1)
        events = EventAccumulator(trainer.loggers[1].log_dir, size_guidance={"histograms": 0}).Reload()
        for name, field in (("gamma", gamma_of), ("reward_margin", reward_margin_of)):
            stored = events.Histograms(f"train/histogram/{name}")
            assert [event.step for event in stored] == [2, 3]
            assert [event.histogram_value.num for event in stored] == [8, 2]
            assert stored[0].histogram_value.sum == pytest.approx(
                counted(module, field, slice(0, 2)).sum(), abs=8 * FLOAT32
            )

    def test_the_picture_is_in_the_run_directory(self, tmp_path: Path) -> None:
        _, trainer = fit(tmp_path, [MarginHistograms()], max_epochs=1)
        picture = matplotlib.image.imread(Path(trainer.log_dir) / "plots" / "gamma_histogram.png")
        assert picture.shape[0] > 500 and np.unique(picture.reshape(-1, 4), axis=0).shape[0] > 50

    def test_a_resumed_run_keeps_the_history(self, tmp_path: Path) -> None:
        whole = MarginHistograms(every_n_steps=2)
        fit(tmp_path / "whole", [whole])
        first = MarginHistograms(every_n_steps=2)
        _, trainer = fit(tmp_path / "first", [first], max_epochs=1)
        trainer.save_checkpoint(tmp_path / "half.ckpt")
        second = MarginHistograms(every_n_steps=2)
        fit(tmp_path / "second", [second], ckpt_path=tmp_path / "half.ckpt")
        assert second.history == whole.history

    def test_values_that_are_not_finite_are_left_out(self, tmp_path: Path) -> None:
        def spoil(output: LossOutput, index: Tensor) -> LossOutput:
            return output._replace(target_margin=output.target_margin.masked_fill(index % 2 == 0, torch.nan))

        histograms = MarginHistograms()
        fit(tmp_path, [histograms], Policy(spoil=spoil), max_epochs=1)
        assert sum(histograms.history["gamma"][0].counts) == 5  # rows 1, 3, 5, 7, 9
        assert sum(histograms.history["reward_margin"][0].counts) == 10

    @pytest.mark.parametrize("options", [{"every_n_steps": -1}, {"bins": 0}])
    def test_impossible_options_are_refused(self, options: dict[str, int]) -> None:
        with pytest.raises(ConfigError, match=next(iter(options))):
            MarginHistograms(**options)


class TestPairRecorder:
    def test_a_file_holds_the_pairs_of_its_step(self, tmp_path: Path) -> None:
        module, trainer = fit(tmp_path, [PairRecorder(every_n_steps=3)])
        folder = Path(trainer.log_dir) / "pairs"
        assert sorted(file.name for file in folder.iterdir()) == [
            "step-000003.parquet",
            "step-000006.parquet",
        ]
        table = pq.read_table(folder / "step-000006.parquet").to_pydict()
        output = module.seen[5]["output"]
        assert table["step"] == [6, 6] and table["epoch"] == [1, 1]
        assert table["index"] == [8, 9] and table["flipped"] == [False, True]  # row 10 is padding
        assert table["chosen_length"] == [7, 7] and table["rejected_length"] == [8, 8]
        expected = {
            "loss": output.per_pair,
            "reward_chosen": output.rewards.chosen,
            "reward_rejected": output.rewards.rejected,
            "reward_margin": output.rewards.chosen - output.rewards.rejected,
            "target_margin": output.target_margin,
            "gradient_weight": output.gradient_weight,
            "logps_chosen": output.evidence.policy.chosen,
            "logps_rejected": output.evidence.policy.rejected,
            "reference_logps_chosen": torch.full((2,), -5.0),
            "reference_logps_rejected": torch.full((2,), -6.0),
        }
        for name, values in expected.items():
            assert table[name] == values[:2].tolist(), name

    def test_without_a_reference_its_columns_are_null_numbers(self, tmp_path: Path) -> None:
        recorder = PairRecorder(every_n_steps=1, folder="looked_at")
        _, trainer = fit(tmp_path, [recorder], Policy(with_reference=False), max_steps=1)
        table = pq.read_table(Path(trainer.log_dir) / "looked_at" / "step-000001.parquet")
        for name in ("reference_logps_chosen", "reference_logps_rejected"):
            assert table[name].null_count == 4 and str(table[name].type) == "float"

    def test_with_accumulation_the_step_counts_not_the_batch(self, tmp_path: Path) -> None:
        recorder = PairRecorder(every_n_steps=1)
        _, trainer = fit(tmp_path, [recorder], accumulate_grad_batches=2, max_epochs=1)
        files = sorted((Path(trainer.log_dir) / "pairs").iterdir())
        assert [pq.read_table(file)["index"].to_pylist() for file in files] == [[4, 5, 6, 7], [8, 9]]
        assert [pq.read_table(file)["step"].to_pylist()[0] for file in files] == [1, 2]

    def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "pairs" / "step-000001.parquet"
        write_parquet(pa.table({"step": [1]}), file)
        monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            write_parquet(pa.table({"step": [2]}), file)
        assert [found.name for found in file.parent.iterdir()] == [file.name]
        assert pq.read_table(file)["step"].to_pylist() == [1]

    @pytest.mark.parametrize(
        "options", [{"every_n_steps": 0}, {"folder": ""}, {"folder": "../elsewhere"}, {"folder": ".."}]
    )
    def test_impossible_options_are_refused(self, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=next(iter(options))):
            PairRecorder(**options)


def spoil_policy(output: LossOutput) -> LossOutput:
    policy = output.evidence.policy
    broken = policy._replace(rejected=torch.full_like(policy.rejected, -torch.inf))
    return output._replace(evidence=output.evidence._replace(policy=broken))


def spoil_reference(output: LossOutput) -> LossOutput:
    reference = output.evidence.reference
    broken = reference._replace(chosen=torch.full_like(reference.chosen, torch.nan))
    return output._replace(evidence=output.evidence._replace(reference=broken))


SPOILED = {
    "rejected log-probability": (spoil_policy, "learning rate"),
    "reference's chosen log-probability": (spoil_reference, "cache"),
    "reward margin": (
        lambda o: o._replace(rewards=o.rewards._replace(chosen=o.rewards.chosen * torch.inf)),
        "beta",
    ),
    "γ": (lambda o: o._replace(target_margin=o.target_margin * torch.nan), "margin SimpleNamespace"),
    "loss": (lambda o: o._replace(per_pair=o.per_pair + torch.inf, loss=o.loss + torch.inf), "beta"),
}


def spoil_row(row: int, change: Callable[[LossOutput], LossOutput]) -> Callable[[LossOutput, Tensor], LossOutput]:
    """Replace the numbers of one row of the dataset by those of the changed output."""

    def pick(bad: Any, good: Any, at: Tensor) -> Any:
        if isinstance(good, Tensor):
            return (bad if at.any() else good) if good.dim() == 0 else torch.where(at, bad, good)
        if good is None:
            return None
        return type(good)(*(pick(b, g, at) for b, g in zip(bad, good, strict=True)))

    return lambda output, index: pick(change(output), output, index == row)


class TestNonFiniteGuard:
    @pytest.mark.parametrize("quantity", list(SPOILED))
    @pytest.mark.parametrize("accumulate", [1, 3])
    def test_a_broken_pair_stops_the_run_before_its_step(self, tmp_path: Path, quantity: str, accumulate: int) -> None:
        change, advice = SPOILED[quantity]
        module = Policy(spoil=spoil_row(6, change))
        sound = Policy()
        fit(tmp_path / "sound", [], sound, max_steps=1, max_epochs=-1)
        # Row 6 is in the second batch: with accumulation neither the first nor the last of its step.
        before = sound.weights if accumulate == 1 else Policy().weights
        with pytest.raises(FloatingPointError) as caught:
            fit(tmp_path, [NonFiniteGuard()], module, accumulate_grad_batches=accumulate)
        message = str(caught.value)
        assert f"optimizer step {2 if accumulate == 1 else 1} was not taken: 1 pair(s)" in message
        assert f"row 6: {quantity} is " in message and advice in message
        assert torch.equal(module.weights, before)

    def test_many_broken_pairs_are_counted_and_the_first_named(self, tmp_path: Path) -> None:
        module = Policy(spoil=lambda output, index: SPOILED["γ"][0](output))
        with pytest.raises(FloatingPointError, match=r"11 pair\(s\).*row 7: .*; and 3 more\."):
            fit(tmp_path, [NonFiniteGuard()], module, accumulate_grad_batches=3)

    def test_a_broken_gradient_names_its_parameter_and_leaves_the_weights(self, tmp_path: Path) -> None:
        module = Policy()
        module.weights.register_hook(lambda gradient: gradient * torch.tensor([1.0, torch.inf]))
        with pytest.raises(FloatingPointError, match=r"step 1 .*norm is inf.*parameter is weights"):
            fit(tmp_path, [NonFiniteGuard()], module)
        assert torch.equal(module.weights, Policy().weights)

    def test_a_norm_that_overflows_is_told_from_a_broken_value(self, tmp_path: Path) -> None:
        module = Policy()
        module.weights.register_hook(lambda gradient: torch.full_like(gradient, 3e38))
        with pytest.raises(FloatingPointError, match=r"norm is inf.*the norm overflows"):
            fit(tmp_path, [NonFiniteGuard()], module)

    def test_a_loss_scaler_may_overflow_the_gradient_but_not_a_pair(self, monkeypatch: pytest.MonkeyPatch) -> None:
        scaler = torch.amp.GradScaler("cpu")
        trainer: Any = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler), global_step=0)
        guard, module = NonFiniteGuard(), Policy()
        monkeypatch.setattr(module, "log", lambda name, value: None)
        optimizer = module.configure_optimizers()
        module.weights.grad = torch.tensor([torch.inf, 0.0])
        for change in (lambda output: output, SPOILED["loss"][0]):
            module.last_batch = collate([1, 2])
            module.last_output = change(module.compute(module.last_batch))
            guard.on_before_backward(trainer, module, module.last_output.loss)
            if change is SPOILED["loss"][0]:
                with pytest.raises(FloatingPointError, match="row 1: loss is inf"):
                    guard.on_before_optimizer_step(trainer, module, optimizer)
            else:
                guard.on_before_optimizer_step(trainer, module, optimizer)

    def test_a_loss_scaler_whose_every_step_overflows_stops_the_run(self, tmp_path: Path) -> None:
        scaler, module = torch.amp.GradScaler("cpu"), Policy()
        module.weights.register_hook(lambda gradient: gradient * torch.inf)
        scales: list[float] = []
        module.log = lambda name, value, **_: scales.append(value) if name == "train/loss_scale" else None
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        with pytest.raises(FloatingPointError, match=r"step 18 was not taken, nor .* scaler is down at 0\.5\. .*bf16"):
            fit(tmp_path, [NonFiniteGuard()], module, plugins=[plugin], max_epochs=-1, max_steps=100)
        assert scales == [2.0**exponent for exponent in range(16, -1, -1)]  # from 65536 to 1: 17 steps skipped
        assert torch.equal(module.weights, Policy().weights)

    def test_the_norm_before_clipping_is_logged(self, tmp_path: Path) -> None:
        norms: list[float] = []
        module = Policy()
        module.weights.register_hook(lambda gradient: norms.append(gradient.square().sum().sqrt().item()))
        _, trainer = fit(tmp_path, [NonFiniteGuard()], module, max_steps=1, max_epochs=-1, gradient_clip_val=1e-3)
        assert norms[0] > 1e-2
        assert trainer.logged_metrics["train/grad_norm"].item() == pytest.approx(norms[0], rel=1e-6)

    def test_a_sound_run_is_not_changed(self, tmp_path: Path) -> None:
        guarded, _ = fit(tmp_path / "guarded", [NonFiniteGuard()], accumulate_grad_batches=2)
        free, _ = fit(tmp_path / "free", [], accumulate_grad_batches=2)
        assert torch.equal(guarded.weights, free.weights)
        assert not torch.equal(free.weights, Policy().weights)


class TestRunPlots:
    def test_curves_are_means_over_the_pairs_of_each_step(self, tmp_path: Path) -> None:
        plots = RunPlots()
        module, trainer = fit(tmp_path, [plots], accumulate_grad_batches=2)
        series = plots.train_series()
        steps = [slice(0, 2), slice(2, 3), slice(3, 5), slice(5, 6)]
        losses = [counted(module, lambda output: output.per_pair, step).mean() for step in steps]
        margins = [counted(module, reward_margin_of, step) for step in steps]
        expected = {
            "loss": losses,
            "margin": [margin.mean() for margin in margins],
            "accuracy": [(margin > 0).mean() for margin in margins],
        }
        for name, values in expected.items():
            assert [step for step, _ in series[name]] == [1, 2, 3, 4]
            assert [value for _, value in series[name]] == pytest.approx(values, abs=FLOAT32)
        assert sorted(file.name for file in (Path(trainer.log_dir) / "plots").iterdir()) == [
            "loss.png",
            "reward_margin.png",
        ]

    def test_a_tie_is_half_right(self, tmp_path: Path) -> None:
        plots, module = RunPlots(), Policy()
        module.weights.data.zero_()  # as at the start of training: the policy is its reference
        fit(tmp_path, [plots], module, max_steps=1, max_epochs=-1)
        assert plots.train_series()["accuracy"] == [(1, 0.5)]

    def test_validation_curves_are_what_was_logged_without_the_sanity_check(self, tmp_path: Path) -> None:
        plots = RunPlots()
        _, trainer = fit(tmp_path, [plots], validate=True, num_sanity_val_steps=1)
        logged = logged_rows(trainer, "val/loss")
        assert [step for step, _ in plots.validation["loss"]] == [3, 6]
        assert [value for _, value in plots.validation["loss"]] == pytest.approx(logged, abs=FLOAT32)
        assert plots.validation["accuracy"] == []  # this module does not log it
        trainer.validate(Policy(), loader(), verbose=False)
        assert len(plots.validation["loss"]) == 2

    def test_a_failed_run_is_drawn_as_far_as_it_came(self, tmp_path: Path) -> None:
        callbacks = [RunPlots(), MarginHistograms(every_n_steps=1), NonFiniteGuard()]
        with pytest.raises(FloatingPointError):
            fit(tmp_path, callbacks, Policy(spoil=spoil_row(9, SPOILED["loss"][0])))
        assert [step for step, _ in callbacks[0].train_series()["loss"]] == [1, 2]
        drawn = {file.name for file in (tmp_path / "csv" / "version_0" / "plots").iterdir()}
        assert drawn == {"loss.png", "reward_margin.png", "gamma_histogram.png"}

    def test_a_run_that_fails_at_once_draws_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(FloatingPointError):
            fit(
                tmp_path,
                [RunPlots(), MarginHistograms(), NonFiniteGuard()],
                Policy(spoil=spoil_row(0, SPOILED["loss"][0])),
            )
        assert not list(tmp_path.rglob("*.png"))

    def test_a_resumed_run_keeps_the_curves(self, tmp_path: Path) -> None:
        whole, first, second = RunPlots(), RunPlots(), RunPlots()
        fit(tmp_path / "whole", [whole], validate=True)
        _, trainer = fit(tmp_path / "first", [first], validate=True, max_epochs=1)
        trainer.save_checkpoint(tmp_path / "half.ckpt")
        fit(tmp_path / "second", [second], validate=True, ckpt_path=tmp_path / "half.ckpt")
        assert second.train_series() == whole.train_series()
        assert second.validation == whole.validation


def test_callbacks_do_not_change_the_training(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    watched, _ = fit(
        tmp_path / "watched",
        [GammaStatistics(), MarginHistograms(every_n_steps=1), PairRecorder(every_n_steps=1), RunPlots()],
    )
    state = torch.get_rng_state()
    seed_everything(0, verbose=False)
    free, _ = fit(tmp_path / "free", [])
    assert torch.equal(watched.weights, free.weights)
    assert torch.equal(state, torch.get_rng_state())


class TestMonitors:
    def test_pairs_and_tokens_are_those_the_model_reads_without_padding(self) -> None:
        prompts, chosen, rejected = (
            [torch.arange(length) for length in lengths] for lengths in ((3, 5), (2, 7), (4, 1))
        )
        expected = {"padded": 5 + 7 + 12 + 6, "packed": 5 + 7 + 12 + 6, "shared_prefix": 3 + 2 + 4 + 5 + 7 + 1}
        for name, layout in LAYOUTS.items():
            batch = PreferenceBatch(
                model_inputs=(layout(prompts, chosen, rejected, 0),),
                index=torch.arange(2),
                weight=torch.ones(2),
                flipped=torch.zeros(2, dtype=torch.bool),
            )
            assert pairs_and_tokens(batch).tolist() == [2, expected[name]]

    def test_throughput_is_pairs_of_all_ranks_by_seconds_without_those_of_validation(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = SimpleNamespace(now=0.0)
        monkeypatch.setattr("gamma_po.callbacks.monitors.time.perf_counter", lambda: clock.now)

        class Slow(Policy):
            def training_step(self, batch: PreferenceBatch, batch_idx: int) -> dict[str, Any]:
                clock.now += 2.0
                return super().training_step(batch, batch_idx)

            def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> dict[str, Any]:
                clock.now += 1000.0
                return super().validation_step(batch, batch_idx)

        class SlowBetweenEpochs(Callback):
            def on_validation_end(self, *args: Any) -> None:
                clock.now += 3000.0

            def on_train_epoch_end(self, *args: Any) -> None:
                clock.now += 5000.0

        other = torch.tensor([[6, 10]])  # pairs and tokens of the second rank
        options = {"validate": True, "val_check_interval": 1, "max_epochs": 2}
        _, trainer = fit(tmp_path, [Throughput(), SlowBetweenEpochs()], Slow(ranks=TwoRanks(other)), **options)
        epoch = [(4 + 6) / 2, (4 + 6) / 2, (2 + 6) / 2]
        assert logged_rows(trainer, "train/pairs_per_second") == pytest.approx(epoch * 2)

    def test_nothing_is_counted_that_is_never_logged(self, tmp_path: Path) -> None:
        throughput = Throughput()
        fit(tmp_path, [throughput], log_every_n_steps=0)
        assert throughput._counted == []

    @pytest.mark.parametrize(("accumulate", "steps"), [(1, 3), (4, 1)])
    def test_the_learning_rate_is_that_of_each_step_beside_its_loss_and_nothing_breaks_without_a_logger(
        self, accumulate: int, steps: int, tmp_path: Path
    ) -> None:
        class Scheduled(Policy):
            def training_step(self, batch: PreferenceBatch, batch_idx: int) -> dict[str, Any]:
                found = super().training_step(batch, batch_idx)
                self.log("train/loss", found["loss"].detach(), batch_size=batch.num_pairs)
                return found

            def configure_optimizers(self) -> Any:
                optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
                schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        _, trainer = fit(tmp_path, [LearningRate()], Scheduled(), max_epochs=2, accumulate_grad_batches=accumulate)
        expected = [0.5 / (1 + step) for step in range(2 * steps)]
        assert logged_rows(trainer, "train/lr") == pytest.approx(expected)
        with (Path(trainer.log_dir) / "metrics.csv").open() as file:
            assert all(bool(row["train/lr"]) == bool(row["train/loss"]) for row in csv.DictReader(file))
        quiet = Trainer(
            accelerator="cpu",
            logger=False,
            callbacks=[LearningRate()],
            max_steps=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        quiet.fit(Scheduled(), loader(), loader())


@pytest.mark.parametrize(
    ("callback", "state"),
    [
        (RunPlots(), {"train_sums": {1: [1.0, 2.0, 3.0, 1.0]}, "validation": {n: [] for n in VALIDATION_KEYS}}),
        (MarginHistograms(), {name: [[0, 1, 0.0, 1.0, [1]]] for name in ("gamma", "reward_margin")}),
    ],
    ids=["plots", "histograms"],
)
def test_a_resumed_run_that_fails_before_its_first_step_draws_nothing_anywhere(
    callback: Any, state: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    callback.load_state_dict(state)
    callback.on_exception(SimpleNamespace(is_global_zero=True), Policy(), RuntimeError())
    assert not list(tmp_path.iterdir())
