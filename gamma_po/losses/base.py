"""What every loss is: evidence and target margins in, one loss per pair out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from gamma_po.ranks import Local, Ranks
from gamma_po.types import Evidence, PairRewards


class Loss(ABC):
    """A preference loss with a per-pair target margin.

    Class attributes say what the rest of the program must provide, and what `python -m gamma_po losses` prints.
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    source: ClassVar[str]
    needs_reference: ClassVar[bool] = True
    centers_kl: ClassVar[bool] = True  # dpo-like: uniform γ should leave the base loss unchanged

    beta: float

    @abstractmethod
    def rewards(self, evidence: Evidence) -> PairRewards:
        """Return the implicit rewards, [P] each, β-scaled."""

    @abstractmethod
    def __call__(self, evidence: Evidence, target_margin: Tensor, ranks: Ranks | None = None) -> Tensor:
        """Return the loss of each pair.

        Args:
            evidence: log-probabilities under policy and reference, [P] each.
            target_margin: γ in reward units, [P]; never differentiated.
            ranks: the processes of the run, for losses that use batch statistics; one process if None.

        Returns:
            [P].
        """


class PairwiseLoss(Loss):
    """A loss of the shape link(reward margin, target margin)."""

    @abstractmethod
    def link(self, reward_margin: Tensor, target_margin: Tensor) -> Tensor:
        """Return the loss of each pair from its two margins, [P]."""

    def __call__(self, evidence: Evidence, target_margin: Tensor, ranks: Ranks | None = None) -> Tensor:
        """Apply the link to the implicit reward margin."""
        return self.link(self.rewards(evidence).margin, target_margin.detach())


def gradient_weight(loss: Loss, evidence: Evidence, target_margin: Tensor, ranks: Ranks | None = None) -> Tensor:
    """How hard each pair pulls: -∂loss_i / ∂reward_chosen_i.

    For DPO this is σ(γ - h): 1/2 at the start, near 0 once a pair is learned.

    Args:
        loss: any loss.
        evidence: [P] each; used without its graph.
        target_margin: γ, [P].
        ranks: as for the loss.

    Returns:
        [P], detached.
    """
    with torch.enable_grad():
        chosen = evidence.policy.chosen.detach().requires_grad_()
        policy = evidence.policy.detach()._replace(chosen=chosen)
        leaf = evidence._replace(policy=policy)
        per_pair = loss(leaf, target_margin.detach(), ranks or Local())
        (of_loss,) = torch.autograd.grad(per_pair.sum(), chosen)
        (of_reward,) = torch.autograd.grad(loss.rewards(leaf).chosen.sum(), chosen)
    return -of_loss / of_reward
