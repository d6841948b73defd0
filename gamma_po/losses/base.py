"""What every loss is: evidence and target margins in, one loss per pair out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from gamma_po import rewards
from gamma_po.errors import ConfigError, require
from gamma_po.ranks import Local, Ranks
from gamma_po.state import NoState
from gamma_po.types import Evidence, PairLogps, PairRewards

MEANING = {
    "shared": "log-probabilities summed over the first min(chosen_length, rejected_length) tokens",
    "on_policy": "means over the completion's tokens of log p(token) - log Σ_v p(v)²",
}


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
    beta_changes: ClassVar[bool] = False  # True: β is another at every step
    couples_pairs: ClassVar[bool] = False  # True: as called, without its `step`, a pair's loss depends on other pairs
    matches_pairs: ClassVar[bool] = False  # True: it compares completions of different pairs
    needs_shared: ClassVar[bool] = False  # True: reads PairLogps.chosen_shared and rejected_shared
    needs_on_policy: ClassVar[bool] = False  # True: reads chosen_on_policy and rejected_on_policy of the policy

    @property
    def reward_scale(self) -> float | None:
        """β, reward units per nat; None for a loss without β."""
        return getattr(self, "beta", None)

    def init(self) -> Any:
        """Return the state before the first step."""
        return NoState()

    def step(self, evidence: Evidence, state: Any, ranks: Ranks | None = None) -> tuple[Loss, Any]:
        """Return the loss of one training step, and the next state.

        Most losses are the same at every step. Evaluation takes no step: there a loss is called as it is.

        Args:
            evidence: of the step, [P] each; read without its graph.
            state: from `init` or the previous step; not changed.
            ranks: the processes of the run; one process if None.

        Returns:
            A loss without state for these pairs; and the next state, equal on every rank.
        """
        return self, state

    def report(self, state: Any) -> dict[str, Tensor]:
        """Return what to log of the state, [] each."""
        return {}

    @abstractmethod
    def rewards(self, evidence: Evidence) -> PairRewards:
        """Return the implicit rewards, [P] each, β-scaled."""

    def __call__(self, evidence: Evidence, target_margin: Tensor, ranks: Ranks | None = None) -> Tensor:
        """Return the loss of each pair.

        Args:
            evidence: log-probabilities under policy and reference, [P] each.
            target_margin: γ in reward units, [P]; never differentiated.
            ranks: the processes of the run, for losses that use batch statistics; one process if None.

        Returns:
            [P].

        Raises:
            ConfigError: the loss needs a reference, and the evidence has none.
            ValueError: γ has not the shape of the log-probabilities.
        """
        self._check(evidence, target_margin)
        return self.of_pairs(evidence, target_margin, ranks)

    @abstractmethod
    def of_pairs(self, evidence: Evidence, target_margin: Tensor, ranks: Ranks | None) -> Tensor:
        """Return the loss of each pair, [P]; what is given has been checked, see `__call__`."""

    def _check(self, evidence: Evidence, target_margin: Tensor) -> None:
        """Refuse evidence without the reference that the loss needs, and a γ that would be broadcast."""
        if self.needs_reference and evidence.reference is None:
            raise ConfigError(
                f"the loss {self.name!r} needs the reference's log-probabilities, but Evidence.reference=None; "
                "allowed: PairLogps of the same pairs"
            )
        expected, given = tuple(evidence.policy.chosen.shape), tuple(target_margin.shape)
        if given != expected:
            raise ValueError(
                f"the target margin of the loss {self.name!r} has shape {given}; allowed: {expected}, one γ per pair"
            )


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

    def of_pairs(self, evidence: Evidence, target_margin: Tensor, ranks: Ranks | None) -> Tensor:
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

    def of_pairs(self, evidence: Evidence, target_margin: Tensor, ranks: Ranks | None) -> Tensor:
        """Shift both rewards by γ/2 and their baselines, then apply the link."""
        chosen, rejected = self.rewards(evidence)
        baseline = self.baseline(PairRewards(chosen.detach(), rejected.detach()), ranks or Local())
        if baseline is not None:
            chosen, rejected = chosen - baseline.chosen, rejected - baseline.rejected
        half = target_margin.detach() / 2
        return self.link(chosen - half, rejected + half)


def require_positive(owner: Any, *options: str) -> None:
    """Raise a ConfigError naming the first of the options of a loss or margin that is not finite and > 0."""
    for option in options:
        value = getattr(owner, option)
        require(0 < value < math.inf, f"{owner.name}.{option}", value, "a number > 0 (finite)")


def require_not_negative(owner: Any, *options: str) -> None:
    """Raise a ConfigError naming the first of the options of a loss or margin that is not finite and >= 0."""
    for option in options:
        value = getattr(owner, option)
        require(0 <= value < math.inf, f"{owner.name}.{option}", value, "a number >= 0 (finite)")


def require_smoothing(loss: Loss, label_smoothing: float) -> None:
    """Raise a ConfigError unless 0 <= ε < 0.5."""
    require(0 <= label_smoothing < 0.5, f"{loss.name}.label_smoothing", label_smoothing, "0 <= ε < 0.5")


def known(logps: PairLogps | None, field: str, loss: Loss) -> tuple[Tensor, Tensor]:
    """Return an optional field of chosen and rejected, [P] each.

    Args:
        logps: of policy or reference.
        field: "shared" or "on_policy".
        loss: that reads it.

    Raises:
        ConfigError: it is not there; naming the loss and the fields.
    """
    if logps is None:
        raise ConfigError(f"the loss {loss.name!r} needs the reference's log-probabilities, which are not given")
    chosen, rejected = getattr(logps, f"chosen_{field}"), getattr(logps, f"rejected_{field}")
    if chosen is None or rejected is None:
        raise ConfigError(
            f"the loss {loss.name!r} needs chosen_{field} and rejected_{field} of PairLogps, which are not given: "
            f"{MEANING[field]}"
        )
    return chosen, rejected


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

    For DPO this is s(γ - h): 1/2 at the start, near 0 once a pair is learned. Where pairs are coupled, statistics
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
        policy = evidence.policy.detach()
        more = torch.zeros_like(policy.chosen, requires_grad=True)  # nats, on a token that both completions have
        shared = policy.chosen_shared if policy.chosen_shared is None else policy.chosen_shared + more
        leaf = evidence._replace(policy=policy._replace(chosen=policy.chosen + more, chosen_shared=shared))
        per_pair = loss(leaf, target_margin.detach(), ranks or Local())
        (of_loss,) = torch.autograd.grad(per_pair.sum(), more)
        (of_reward,) = torch.autograd.grad(loss.rewards(leaf).chosen.sum(), more)
    return -of_loss / of_reward
