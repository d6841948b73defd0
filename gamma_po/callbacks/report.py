"""After `fit` and `test`: what changed, as one table and as report.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from torch import Tensor

from gamma_po.errors import require
from gamma_po.evaluation.generation import Sampling
from gamma_po.evaluation.gold import GoldReward
from gamma_po.evaluation.on_policy import Comparison, compare, draw, score_samples
from gamma_po.evaluation.report import as_json, pair_report, report_table, samples_table
from gamma_po.files import write_text
from gamma_po.policies import evaluating
from gamma_po.progress import track


class Report(Callback):
    """Compares policy and reference on the test split: clean pairs, and their own samples.

    Args:
        enabled: off for throw-away runs.
        num_prompts: test prompts for which both models write a completion; 0 for none.
        sampling: how completions are drawn.
        gold: scores completions; null where there is no programmatic judge.
        show: how many samples to print side by side.
    """

    def __init__(
        self,
        *,
        enabled: bool = True,
        num_prompts: int = 64,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        gold: GoldReward | None = None,
        show: int = 10,
    ) -> None:
        require(num_prompts >= 0, "report.num_prompts", num_prompts, "an integer >= 0")
        require(show >= 0, "report.show", show, "an integer >= 0")
        self.enabled, self.num_prompts, self.sampling, self.gold, self.show = (
            enabled,
            num_prompts,
            sampling,
            gold,
            show,
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the test pairs, then report."""
        datamodule = trainer.datamodule
        if not self.enabled or datamodule is None:
            return
        if datamodule.sources["test"] is None:
            rank_zero_warn("no report: data.test is not set")
            return
        metrics = pl_module.pair_metrics
        metrics.reset()
        with evaluating(pl_module), torch.no_grad(), pl_module.precision_context():
            for batch in track(datamodule.test_dataloader(), "test pairs", visible=trainer.is_global_zero):
                pl_module.test_step(batch.to(pl_module.device), 0)
        with metrics.sync_context(should_sync=trainer.world_size > 1):
            table = metrics.table()
        metrics.reset()
        self._report(trainer, pl_module, table)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report on the pairs that `test` has scored."""
        if self.enabled and trainer.datamodule is not None:
            metrics = pl_module.pair_metrics
            with metrics.sync_context(should_sync=trainer.world_size > 1):
                table = metrics.table()
            self._report(trainer, pl_module, table)

    def _report(self, trainer: Trainer, module: LightningModule, table: dict[str, Tensor]) -> None:
        """Measure, print and save; samples come from the first process."""
        samplable = isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))
        if not samplable and self.num_prompts:
            rank_zero_warn(f"no samples: generation under {type(trainer.strategy).__name__} is not supported")
        folder = trainer.log_dir
        if not trainer.is_global_zero:
            return
        pairs = pair_report(table, [preference.prompt for preference in trainer.datamodule.preferences["test"]])
        comparison, rows = None, []
        if samplable and self.num_prompts:
            comparison, rows = self._samples(module, trainer.datamodule.datasets["test"].pairs)
        console = Console()
        if rows[: self.show]:
            console.print(samples_table(rows[: self.show]))
        console.print(report_table(pairs, comparison, len(rows)))
        result = {"pairs": as_json(pairs), "samples": as_json(comparison), "texts": rows}
        if folder is not None:
            path = Path(folder) / "report.json"
            write_text(path, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
            console.print(f"report: {path}")

    def _samples(self, module: LightningModule, pairs: Any) -> tuple[Comparison, list[dict[str, Any]]]:
        prompts = list({tuple(pair.prompt.tolist()): pair.prompt for pair in pairs}.values())[: self.num_prompts]
        tokenizer, sampling = module.tokenizer, self.sampling
        with module.precision_context():
            with evaluating(module.policy):
                policy = draw(module.policy, tokenizer, prompts, sampling, self.gold, "samples of the policy")
                own = score_samples(module.policy, prompts, policy.tokens, sampling, "their log-probabilities")
            with module.open_reference() as scorer:
                reference = draw(scorer, tokenizer, prompts, sampling, self.gold, "samples of the reference")
                other = score_samples(scorer, prompts, policy.tokens, sampling, "log-probabilities, reference")
        rows = [
            {
                "prompt": tokenizer.decode(prompt, skip_special_tokens=True),
                "reference": reference.texts[i],
                "policy": policy.texts[i],
                "gold_reference": None if reference.gold is None else float(reference.gold[i]),
                "gold_policy": None if policy.gold is None else float(policy.gold[i]),
            }
            for i, prompt in enumerate(prompts)
        ]
        return compare(policy, reference, own - other), rows
