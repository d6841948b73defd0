"""One step of the algebra: evidence -> rewards -> target margin -> loss, and what is reported of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gamma_po.losses import Loss, gradient_weight
from gamma_po.margins import Margin
from gamma_po.ranks import Ranks
from gamma_po.types import Evidence, LossOutput, PairRewards


class StepState(NamedTuple):
    """What is remembered between training steps."""

    loss: Any
    margin: Any


def train(
    loss: Loss, margin: Margin, evidence: Evidence, state: StepState, ranks: Ranks
) -> tuple[LossOutput, StepState]:
    """Take a training step: `evaluate` the loss that `loss` is at this step.

    Args:
        loss, margin, evidence, ranks: see `evaluate`.
        state: of loss and margin, on the device of the evidence.

    Returns:
        The output, and the next state.
    """
    stepped, loss_state = loss.step(evidence, state.loss, ranks)
    output, margin_state = evaluate(stepped, margin, evidence, state.margin, ranks)
    return output, StepState(loss_state, margin_state)


def evaluate(loss: Loss, margin: Margin, evidence: Evidence, state: Any, ranks: Ranks) -> tuple[LossOutput, Any]:
    """Return the loss of P pairs under their target margins, and the margin's next state.

    per_pair = loss(evidence, stop_gradient(γ)), γ = margin(reward margin, evidence, state).

    Args:
        loss: any loss.
        margin: any margin, bound to the loss.
        evidence: [P] each, with the policy's graph.
        state: of the margin, on the device of the evidence.
        ranks: the processes of the run.

    Returns:
        The output; only its `loss`, the mean over the pairs, carries a graph.
    """
    rewards = loss.rewards(evidence)
    target_margin, state = margin(rewards.margin.detach(), evidence, state, ranks)
    per_pair = loss(evidence, target_margin, ranks)
    evidence = evidence.map(Tensor.detach)
    with torch.inference_mode(False):  # the weight is a gradient, also where Lightning evaluates in inference mode
        weight = gradient_weight(loss, evidence.map(torch.clone), target_margin.clone(), ranks)
    output = LossOutput(
        loss=per_pair.mean(),
        per_pair=per_pair.detach(),
        rewards=PairRewards(rewards.chosen.detach(), rewards.rejected.detach()),
        target_margin=target_margin,
        gradient_weight=weight,
        evidence=evidence,
    )
    return output, state


def short_step_factor(batch_idx: int, num_batches: float, accumulate: int) -> float:
    """Return what a micro-batch's loss is multiplied by so that an optimizer step is a mean over its micro-batches.

    The trainer divides every loss by `accumulate`, also in an epoch's last step, which has fewer micro-batches where
    their number is no multiple of it.

    Args:
        batch_idx: the micro-batch's place in the epoch, from 0.
        num_batches: of the epoch; infinity where unknown.
        accumulate: micro-batches per optimizer step, >= 1.

    >>> [short_step_factor(i, 5, 2) for i in range(5)]
    [1.0, 1.0, 1.0, 1.0, 2.0]
    """
    left = num_batches - batch_idx // accumulate * accumulate
    return accumulate / min(left, accumulate)


def training_log(output: LossOutput) -> dict[str, Tensor]:
    """What is logged of a training step, [] each."""
    rewards, policy = output.rewards, output.evidence.policy
    return {
        "train/loss": output.loss,
        "train/rewards/chosen": rewards.chosen.mean(),
        "train/rewards/rejected": rewards.rejected.mean(),
        "train/rewards/margins": rewards.margin.mean(),
        "train/rewards/accuracies": (rewards.margin > 0).float().mean() + 0.5 * (rewards.margin == 0).float().mean(),
        "train/logps/chosen": policy.chosen.mean(),
        "train/logps/rejected": policy.rejected.mean(),
    }


class StepLog:
    """Values of an optimizer step, each the mean over the pairs of its micro-batches and ranks, as its loss is one.

    All ranks meet in one reduction per step: Lightning would make one, and a barrier, of each value. What a cut into
    micro-batches changes by nature (a loss or a γ that looks at several pairs at once, what a loss remembers, such as
    β-DPO's β) is the mean of what the micro-batches had.
    """

    def __init__(self) -> None:
        self.micro_batches: list[Tensor] = []  # of the step so far, [values] each
        self.names: list[str] = []

    def add(self, values: dict[str, Tensor | float], weight: Tensor) -> None:
        """Add a micro-batch.

        Args:
            values: by name, [] each; the same names each time.
            weight: what its pairs count for, [P].
        """
        self.names = list(values)
        own = torch.stack([torch.as_tensor(value, device=weight.device).float() for value in values.values()])
        self.micro_batches.append(own * weight.mean())

    def end(self, ranks: Ranks) -> dict[str, Tensor]:
        """Return the step's values, and begin the next step."""
        means, self.micro_batches = ranks.mean(torch.stack(self.micro_batches).mean(0)), []
        return dict(zip(self.names, means, strict=True))


def check_finite(reward_margin: Tensor, rows: Tensor, step: int) -> None:
    """Stop before a margin or the optimizer meets a NaN or an infinity.

    Args:
        reward_margin: h, [P].
        rows: of the pairs in their split, [P].
        step: optimizer steps taken.

    Raises:
        FloatingPointError: naming the step and the rows of the data.
    """
    finite = torch.isfinite(reward_margin)
    if not bool(finite.all()):
        raise FloatingPointError(
            f"step {step}: the reward margin is not finite for the pairs in rows {rows[~finite][:8].tolist()} of the "
            "split. The weights are those of the step before. Look at these rows with `predict`; try a lower learning "
            "rate, a smaller beta, gradient clipping (trainer.gradient_clip_val), or trainer.precision 32-true"
        )
