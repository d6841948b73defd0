"""After `fit` and `test`: what changed, as one table and as report.json; every test pair in test_pairs.parquet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console
from torch import Tensor

from gamma_po.callbacks.pair_recorder import write_parquet
from gamma_po.callbacks.samples import holds_whole_policy
from gamma_po.errors import require
from gamma_po.evaluation.generation import Sampling
from gamma_po.evaluation.gold import GoldReward
from gamma_po.evaluation.on_policy import (
    Comparison,
    compare,
    distinct_prompts,
    draw,
    score_completions,
    shown_prompt,
)
from gamma_po.evaluation.report import as_json, last_values_table, pair_report, report_table, samples_table
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
        allowed = "a number > 0, for which log-probabilities of samples are defined"
        require(sampling.temperature > 0, "report.sampling.temperature", sampling.temperature, allowed)
        if enabled and num_prompts == 0:
            nothing = "report.num_prompts above 0, as without samples nothing reads it"
            require(gold is None, "report.gold", type(gold).__name__, f"null, or {nothing}")
            require(sampling == Sampling(), "report.sampling", sampling, f"its default, or {nothing}")
        self.enabled, self.num_prompts, self.sampling, self.gold, self.show = (
            enabled,
            num_prompts,
            sampling,
            gold,
            show,
        )
        self._reported = False

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report also where the checkpoint is from the end of its training, and Lightning trains no more."""
        if not self._reported:
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the test pairs, then report."""
        self._reported = True
        datamodule = trainer.datamodule
        if not self.enabled or datamodule is None:
            return
        if datamodule.sources["test"] is None:
            rank_zero_info("no comparison with the reference: data.test is not set")
            if trainer.is_global_zero:
                Console().print(last_values_table(trainer.callback_metrics))
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
        datamodule = trainer.datamodule
        samplable = holds_whole_policy(trainer)
        if not samplable:
            rank_zero_warn(f"no samples: generation under {type(trainer.strategy).__name__} is not supported")
        folder = trainer.log_dir
        if not trainer.is_global_zero:
            return
        preferences, pairs = datamodule.preferences["test"], datamodule.datasets["test"].pairs
        if module.reference is None and samplable:
            scored = [pairs[i] for i in table["index"].tolist()]
            table = {**table, **self._reference_logps(module, scored, datamodule.eval_batch_size)}
        summary = pair_report(table, [preferences[i].prompt for i in table["index"].tolist()])
        if folder is not None:
            columns = {name: values.cpu().numpy() for name, values in table.items()}
            write_parquet(pa.table(columns), Path(folder) / "test_pairs.parquet")
        comparison, rows = None, []
        if samplable and self.num_prompts:
            comparison, rows = self._samples(module, preferences, pairs)
        console = Console()
        if rows[: self.show]:
            console.print(samples_table(rows[: self.show]))
        console.print(report_table(summary, comparison, len(rows), starts_at_zero=module.reference is not None))
        result = {"pairs": as_json(summary), "samples": as_json(comparison), "texts": rows}
        if folder is not None:
            path = Path(folder) / "report.json"
            write_text(path, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
            console.print(f"report: {path}")

    def _reference_logps(self, module: LightningModule, pairs: Any, size: int) -> dict[str, Tensor]:
        """The reference's log-probabilities of the test pairs, for losses that read none."""
        logps = []
        with module.precision_context(), module.open_reference() as scorer:
            for side in ("chosen", "rejected"):
                prompts, completions = [pair.prompt for pair in pairs], [getattr(pair, side) for pair in pairs]
                logps.append(
                    score_completions(
                        scorer, prompts, completions, batch_size=size, description=f"{side} under the reference"
                    )
                )
        return {"reference_logps_chosen": logps[0], "reference_logps_rejected": logps[1]}

    def _samples(
        self, module: LightningModule, preferences: Any, pairs: Any
    ) -> tuple[Comparison, list[dict[str, Any]]]:
        """Let policy and reference answer the first prompts of the split."""
        chosen = distinct_prompts(preferences, self.num_prompts)
        prompts = [pairs[i].prompt for i in chosen]
        tokenizer, sampling = module.tokenizer, self.sampling
        how = {"batch_size": sampling.batch_size, "temperature": sampling.temperature}
        with module.precision_context():
            with evaluating(module.policy):
                policy = draw(module.policy, tokenizer, prompts, sampling, self.gold, "samples of the policy")
                own = score_completions(
                    module.policy, prompts, policy.tokens, description="their log-probabilities", **how
                )
            with module.open_reference() as scorer:
                reference = draw(scorer, tokenizer, prompts, sampling, self.gold, "samples of the reference")
                other = score_completions(scorer, prompts, policy.tokens, description="... under the reference", **how)
        rows = [
            {
                "prompt": shown_prompt(preferences[i].prompt),
                "reference": reference.texts[n],
                "policy": policy.texts[n],
                "gold_reference": None if reference.gold is None else float(reference.gold[n]),
                "gold_policy": None if policy.gold is None else float(policy.gold[n]),
            }
            for n, i in enumerate(chosen)
        ]
        return compare(policy, reference, own - other), rows
