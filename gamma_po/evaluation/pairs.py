"""Metrics over pairs, accumulated with torchmetrics: one row per pair, so that nothing is averaged twice."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from gamma_po.types import LossOutput


def preferred(margin: Tensor) -> Tensor:
    """1 where the margin is positive, 1/2 at a tie, 0 where it is negative."""
    return 0.5 * (margin.sign() + 1)


class PairMetrics(Metric):
    """Collects each pair's values over batches and ranks; a row that comes twice counts once.

    `compute` returns means over pairs under the log's names; `table` the rows themselves.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    @staticmethod
    def columns(output: LossOutput) -> dict[str, Tensor]:
        """Return the per-pair values that are kept, [P] each, float32."""
        policy, reference = output.evidence.policy, output.evidence.reference
        nothing = torch.full_like(policy.chosen, torch.nan)
        columns = {
            "loss": output.per_pair,
            "target_margin": output.target_margin,
            "rewards_chosen": output.rewards.chosen,
            "rewards_rejected": output.rewards.rejected,
            "logps_chosen": policy.chosen,
            "logps_rejected": policy.rejected,
            "reference_logps_chosen": nothing if reference is None else reference.chosen,
            "reference_logps_rejected": nothing if reference is None else reference.rejected,
            "length_chosen": policy.chosen_length,
            "length_rejected": policy.rejected_length,
        }
        return {name: value.float() for name, value in columns.items()}

    def update(self, output: LossOutput, index: Tensor) -> None:
        """Add the pairs of one batch.

        Args:
            output: of P pairs.
            index: rows of the pairs in their split, [P].
        """
        columns = self.columns(output)
        self.names = list(columns)
        self.rows.append(torch.stack([index.float(), *columns.values()], dim=1))

    def table(self) -> dict[str, Tensor]:
        """Return all rows in the order of their index, [N] each."""
        rows = torch.cat(self.rows) if isinstance(self.rows, list) else self.rows
        _, first = _first_of_each(rows[:, 0])
        rows = rows[first]
        return {"index": rows[:, 0].long(), **dict(zip(self.names, rows[:, 1:].unbind(1), strict=True))}

    def compute(self) -> dict[str, Tensor]:
        """Return the means over pairs."""
        table = self.table()
        margin = table["rewards_chosen"] - table["rewards_rejected"]
        values = {
            "loss": table["loss"],
            "rewards/chosen": table["rewards_chosen"],
            "rewards/rejected": table["rewards_rejected"],
            "rewards/margins": margin,
            "rewards/accuracies": preferred(margin),
            "logps/chosen": table["logps_chosen"],
            "logps/rejected": table["logps_rejected"],
            "accuracy/policy": preferred(table["logps_chosen"] - table["logps_rejected"]),
        }
        if not table["reference_logps_chosen"].isnan().any():
            gap = table["reference_logps_chosen"] - table["reference_logps_rejected"]
            values["accuracy/reference"] = preferred(gap)
        return {name: value.mean() for name, value in values.items()}


def _first_of_each(index: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted distinct values and where each occurs first."""
    values, inverse = torch.unique(index, return_inverse=True)
    position = torch.arange(len(index), device=index.device)
    first = torch.full((len(values),), len(index), device=index.device).scatter_reduce(0, inverse, position, "amin")
    return values, first
