"""This project's side: `python -m gamma_po fit` as users run it, with its loggers and callbacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback

from duel.plan import BETA, LEARNING_RATE, LORA_ALPHA, LORA_R, Arm, Setting
from duel.turns import Facts, Gate, median_seconds
from gamma_po.cli import PreferenceCLI
from gamma_po.margins import build_margin
from gamma_po.module import PreferenceModule
from gamma_po.objective import evaluate
from gamma_po.types import PreferenceBatch

MARGIN_REPEATS = 100


def options(setting: Setting, arm: Arm) -> list[str]:
    """The command line of a run."""
    given: dict[str, Any] = {
        "run.root": setting.folder / "runs",
        "trainer.accelerator": "gpu" if setting.device == "cuda" else "cpu",
        "trainer.devices": 1,
        "trainer.max_steps": setting.num_steps,
        "trainer.precision": "bf16-mixed" if setting.dtype == "bfloat16" else "32-true",
        "trainer.gradient_clip_val": setting.max_gradient_norm or "null",
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
        "model.policy.path": setting.model,
        "model.policy.dtype": setting.dtype,
        "model.policy.attention": setting.attention,
        "model.loss": "DPO",
        "model.loss.beta": BETA,
        "model.margin": arm.margin,
        "model.gradient_checkpointing": str(arm.checkpointing).lower(),
        "model.optimizer": "torch.optim.AdamW",
        "model.optimizer.lr": LEARNING_RATE,
        "model.optimizer.weight_decay": 0.0,
        "model.schedule": "constant",
        "model.warmup_ratio": 0.0,
        "data.train": setting.rows,
        "data.batch_size": setting.batch_size,
        "data.layout": setting.layout,
        "data.cache_dir": setting.folder / "reference_cache",
        "report.enabled": "false",
        "export.enabled": "false",
    }
    if setting.fused_optimizer:
        given["model.optimizer.fused"] = "true"
    if setting.mode == "lora":
        given |= {"model.lora.r": LORA_R, "model.lora.alpha": LORA_ALPHA}
    return [*(word for name, value in given.items() for word in (f"--{name}", str(value))), *setting.our_options]


def fit(setting: Setting, arm: Arm, callback: Callback) -> None:
    """Run `fit` with one more callback, the last one."""
    cli = PreferenceCLI(options(setting, arm), run=False)
    cli.trainer.callbacks.append(callback)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)


def train(setting: Setting, arm: Arm, gate: Gate) -> None:
    """Train, waiting at the gate after each step."""
    fit(setting, arm, _Waiting(gate))


class _Waiting(Callback):
    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def on_train_batch_end(
        self, trainer: Any, pl_module: PreferenceModule, outputs: Any, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        self.gate.after_step(
            lambda: facts_of(batch, float(outputs["loss"])), {"margin": lambda: margin_seconds(pl_module)}
        )


def facts_of(batch: PreferenceBatch, loss: float) -> Facts:
    """What was trained on."""
    rows = batch.model_input
    return Facts(tuple(batch.index.tolist()), loss, rows.targets.numel(), rows.input_ids.numel())


def margin_seconds(module: PreferenceModule) -> float:
    """Process time by which the kl margin makes the algebra of a step longer, its history full.

    Too short to be seen in whole steps, so the algebra is repeated on the last batch, with and without the margin.
    """
    return _algebra_seconds(module, "kl") - _algebra_seconds(module, "none")


def _algebra_seconds(module: PreferenceModule, margin_name: str) -> float:
    margin = build_margin(margin_name).bind(module.loss)
    evidence, state = module.last_output.evidence, margin.init()

    def step() -> None:
        nonlocal state
        _, state = evaluate(module.loss, margin, evidence, state, module.ranks)

    action: Callable[[], None] = step
    return median_seconds(action, repeats=MARGIN_REPEATS)
