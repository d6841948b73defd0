"""What every loss is: evidence and target margins in, one loss per pair out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from gamma_po import rewards
from gamma_po.errors import ConfigError, require
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
    takes_margin: ClassVar[bool] = True  # False: no preference in the loss, so a margin is an error
    couples_pairs: ClassVar[bool] = False  # True: a pair's loss depends on the other pairs of the micro-batch

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


class LogRatioRewards(Loss):
    """A loss on DPO's rewards, β (log π - log π_ref)."""

    beta: float

    def __post_init__(self) -> None:
        """Check β."""
        require_positive(self, "beta")

    def rewards(self, evidence: Evidence) -> PairRewards:
        """β (log π - log π_ref)."""
        return rewards.log_ratio_rewards(evidence, self.beta)


class PairwiseLoss(Loss):
    """A loss of the shape link(reward margin, target margin): a function of h - γ alone."""

    def reward_margin(self, evidence: Evidence) -> Tensor:
        """Return what the link sees as h, [P]."""
        return self.rewards(evidence).margin

    @abstractmethod
    def link(self, reward_margin: Tensor, target_margin: Tensor) -> Tensor:
        """Return the loss of each pair from its two margins, [P]."""

    def __call__(self, evidence: Evidence, target_margin: Tensor, ranks: Ranks | None = None) -> Tensor:
        """Apply the link to the implicit reward margin."""
        return self.link(self.reward_margin(evidence), target_margin.detach())


class TwoSidedLoss(LogRatioRewards):
    """A loss that judges each completion's reward against a baseline.

    Half of γ is taken from the chosen reward and half is added to the rejected one, so that h becomes h - γ.
    """

    def baseline(self, pair_rewards: PairRewards, ranks: Ranks) -> PairRewards | None:
        """Return what chosen and rejected rewards are measured from, without graph; None for zero."""
        return None

    @abstractmethod
    def link(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Return the loss of each pair from its two shifted rewards, [P]."""

    def __call__(self, evidence: Evidence, target_margin: Tensor, ranks: Ranks | None = None) -> Tensor:
        """Shift both rewards by γ/2 and their baselines, then apply the link."""
        chosen, rejected = self.rewards(evidence)
        baseline = self.baseline(PairRewards(chosen.detach(), rejected.detach()), ranks or Local())
        if baseline is not None:
            chosen, rejected = chosen - baseline.chosen, rejected - baseline.rejected
        half = target_margin.detach() / 2
        return self.link(chosen - half, rejected + half)


def require_positive(loss: Loss, *options: str) -> None:
    """Raise a ConfigError naming the first of the options that is not > 0."""
    for option in options:
        value = getattr(loss, option)
        require(value > 0, f"{loss.name}.{option}", value, "a number > 0")


def require_smoothing(loss: Loss, label_smoothing: float) -> None:
    """Raise a ConfigError unless 0 <= ε < 0.5."""
    require(0 <= label_smoothing < 0.5, f"{loss.name}.label_smoothing", label_smoothing, "0 <= ε < 0.5")


def require_margin_fits(loss: Loss, margin: str) -> None:
    """Refuse a margin for a loss that compares nothing.

    Args:
        loss: any loss.
        margin: registry name of the margin; "none" fits every loss.

    Raises:
        ConfigError: naming both.
    """
    if not loss.takes_margin and margin != "none":
        raise ConfigError(
            f"the margin {margin!r} is not allowed with the loss {loss.name!r}, which does not compare chosen and "
            "rejected; allowed: none"
        )


def gradient_weight(loss: Loss, evidence: Evidence, target_margin: Tensor, ranks: Ranks | None = None) -> Tensor:
    """How hard each pair pulls: -∂(Σ_j loss_j) / ∂reward_chosen_i, which for most losses is of loss_i alone.

    For DPO this is σ(γ - h): 1/2 at the start, near 0 once a pair is learned. Where pairs are coupled, statistics
    of the batch (KTO's K, BCO's δ) and the other ranks' pairs are constants, as in training.

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
