"""What the policy writes while it is trained: a table of samples each epoch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn

from gamma_po.callbacks.plots import run_directory
from gamma_po.errors import ConfigError, require
from gamma_po.evaluation.generation import Sampling
from gamma_po.evaluation.on_policy import distinct_prompts, draw, shown_prompt
from gamma_po.files import write_text
from gamma_po.policies import evaluating

Split = Literal["train", "validation", "test"]
COLUMNS = ("epoch", "step", "prompt", "completion", "tokens")


class Samples(Callback):
    """Let the policy answer the same prompts at the end of each epoch.

    `<run directory>/samples/epoch-001.jsonl` holds a line per prompt: epoch (from 1), optimizer step, prompt,
    completion and its number of tokens. The same table goes to every TensorBoard logger of the run (as text) and to
    every logger that takes tables, such as Weights & Biases, under `samples`. Drawing touches neither the training's
    random state nor the policy. The first process draws; where weights are sharded nothing is drawn, with a message.

    Args:
        num_prompts: different prompts, the first of the split; 0 for none.
        split: whose prompts.
        every_n_epochs: epochs between tables, >= 1.
        sampling: how completions are drawn.
    """

    def __init__(
        self,
        *,
        num_prompts: int = 0,
        split: Split = "validation",
        every_n_epochs: int = 1,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    ) -> None:
        require(num_prompts >= 0, "samples.num_prompts", num_prompts, "an integer >= 0")
        require(every_n_epochs >= 1, "samples.every_n_epochs", every_n_epochs, "an integer >= 1")
        require(split in get_args(Split), "samples.split", split, ", ".join(get_args(Split)))
        given = {"split": split != "validation", "every_n_epochs": every_n_epochs != 1}
        for name, differs in {**given, "sampling": sampling != Sampling()}.items():
            if differs and num_prompts == 0:
                raise ConfigError(f"samples.{name} is not used with samples.num_prompts=0; allowed: more, or no {name}")
        self.num_prompts, self.split, self.every_n_epochs, self.sampling = num_prompts, split, every_n_epochs, sampling

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say now what could not be done later."""
        self.check(trainer)

    def check(self, trainer: Trainer) -> None:
        """Say what the run could not draw; its data is read.

        Raises:
            ConfigError: there is no data module, or its data has no such split.
        """
        datamodule = trainer.datamodule
        if not self.num_prompts:
            return
        if not holds_whole_policy(trainer):
            rank_zero_warn(f"no samples: {type(trainer.strategy).__name__} may shard the policy; nothing is drawn then")
        elif datamodule is None:
            raise ConfigError(
                f"samples.num_prompts={self.num_prompts}: the prompts are a data module's, and the trainer has none; "
                "allowed here: 0, or fit(module, datamodule=PreferenceDataModule(...))"
            )
        elif self.split not in datamodule.datasets:
            there = ", ".join(datamodule.datasets)
            raise ConfigError(f"samples.split={self.split!r}: data.{self.split} is not set; allowed here: {there}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, write and log, if the epoch is due."""
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        folder = run_directory(trainer)  # on every process: the others ask the first one
        if self.num_prompts and due and holds_whole_policy(trainer) and trainer.is_global_zero:
            rows = self._rows(trainer, pl_module)
            path = folder / "samples" / f"epoch-{trainer.current_epoch + 1:03d}.jsonl"
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            log_table(trainer, "samples", rows)

    def _rows(self, trainer: Trainer, module: LightningModule) -> list[dict[str, Any]]:
        preferences, pairs = (getattr(trainer.datamodule, name)[self.split] for name in ("preferences", "datasets"))
        chosen = distinct_prompts(preferences, self.num_prompts)
        prompts = [pairs.pairs[i].prompt for i in chosen]
        with evaluating(module.policy), module.precision_context():
            drawn = draw(module.policy, module.tokenizer, prompts, self.sampling, None, "samples of the policy")
        here = (trainer.current_epoch + 1, trainer.global_step)
        texts = zip(chosen, drawn.texts, drawn.tokens, strict=True)
        return [
            dict(zip(COLUMNS, (*here, shown_prompt(preferences[i].prompt), text, len(ids)), strict=True))
            for i, text, ids in texts
        ]


def log_table(trainer: Trainer, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Give a table to the loggers that take one: TensorBoard as text, others by their `log_table`."""
    columns = list(rows[0])
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, markdown(rows), trainer.global_step)
        elif hasattr(logger, "log_table"):
            logger.log_table(name, columns=columns, data=[list(row.values()) for row in rows], step=trainer.global_step)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as a Markdown table.

    >>> print(markdown([{"prompt": "a|b", "tokens": 2}]))
    | prompt | tokens |
    | --- | --- |
    | a\\|b | 2 |
    """
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", "<br>")


def holds_whole_policy(trainer: Trainer) -> bool:
    """Tell whether the first process can draw alone. Strategies derived from these, as DeepSpeed's, may shard."""
    return type(trainer.strategy) in (SingleDeviceStrategy, DDPStrategy)
