"""Losses around another loss: other divergences, length desensitization, on-policy weights, a likelihood term."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from gamma_po import rewards
from gamma_po.errors import require
from gamma_po.losses.base import LogRatioRewards, Loss, PairwiseLoss, known, require_positive
from gamma_po.losses.dpo import DPO
from gamma_po.ranks import Ranks
from gamma_po.types import Evidence, PairLogps, PairRewards


def of_inner(attribute: str) -> Any:
    """Return a property that is the inner loss's."""
    return property(lambda wrapper: getattr(wrapper.loss, attribute))


class Wrapper(Loss):
    """A loss around another one: what it says of itself is what the inner loss says, where it adds nothing."""

    loss: Loss

    needs_reference = of_inner("needs_reference")
    centers_kl = of_inner("centers_kl")
    takes_margin = of_inner("takes_margin")
    couples_pairs = of_inner("couples_pairs")
    matches_pairs = of_inner("matches_pairs")
    needs_shared = of_inner("needs_shared")
    needs_on_policy = of_inner("needs_on_policy")
    reward_scale = of_inner("reward_scale")
    beta_changes = of_inner("beta_changes")

    def init(self) -> Any:
        """The inner loss's state."""
        return self.loss.init()

    def step(self, evidence: Evidence, state: Any, ranks: Ranks | None = None) -> tuple[Loss, Any]:
        """The inner loss's step, wrapped."""
        inner, state = self.loss.step(evidence, state, ranks)
        return (self if inner is self.loss else dataclasses.replace(self, loss=inner)), state  # type: ignore[type-var]

    def report(self, state: Any) -> dict[str, Tensor]:
        """What the inner loss reports."""
        return self.loss.report(state)

    def rewards(self, evidence: Evidence) -> PairRewards:
        """The inner loss's rewards."""
        return self.loss.rewards(evidence)


class OtherEvidence(Wrapper):
    """The inner loss on other log-probabilities than the model's."""

    @abstractmethod
    def seen(self, evidence: Evidence) -> Evidence:
        """Return what the inner loss sees."""

    def rewards(self, evidence: Evidence) -> PairRewards:
        """The inner loss's rewards of what it sees."""
        return self.loss.rewards(self.seen(evidence))

    def of_pairs(self, evidence: Evidence, target_margin: Tensor, ranks: Ranks | None) -> Tensor:
        """The inner loss of what it sees."""
        return self.loss(self.seen(evidence), target_margin, ranks)


@dataclass(frozen=True, kw_only=True)
class FDPO(OtherEvidence):
    """f-DPO: a loss of the log-ratio difference with f'(π/π_ref) in place of log(π/π_ref).

    f generates the divergence that keeps the policy near the reference. Rewards are β f'(π/π_ref), so γ is in the
    same units and shifts their difference. f' is `rewards.divergence_score`.

    Args:
        loss: a loss of h alone with a reference; its β is β.
        divergence: reverse_kl is the loss itself; forward_kl; js_divergence; alpha_divergence.
        alpha: a number α in (0, 1), with alpha_divergence only: near 0 it is the reverse, near 1 the forward KL.

    Source:
        f-DPO, arXiv 2309.16240.
    """

    name: ClassVar[str] = "f_dpo"
    formula: ClassVar[str] = "loss(h-γ), h = β (f'(e^r_w) - f'(e^r_l)); f' = r, 1-e^-r, log 2 + log s(r), (1-e^-αr)/α"
    source: ClassVar[str] = "f-DPO, arXiv 2309.16240"

    loss: Loss = field(default_factory=DPO)
    divergence: rewards.Divergence = "js_divergence"
    alpha: float | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        fits = isinstance(self.loss, PairwiseLoss) and self.loss.needs_reference
        require(fits, "f_dpo.loss", self.loss.name, "a loss of h alone with a reference (dpo, ipo, hinge, ...)")
        names = get_args(rewards.Divergence)
        require(self.divergence in names, "f_dpo.divergence", self.divergence, ", ".join(names))
        if self.divergence == "alpha_divergence":
            require(self.alpha is not None and 0 < self.alpha < 1, "f_dpo.alpha", self.alpha, "0 < α < 1")
        else:
            require(self.alpha is None, "f_dpo.alpha", self.alpha, f"nothing with divergence={self.divergence}")

    def seen(self, evidence: Evidence) -> Evidence:
        """A reference of zeros and a policy whose log-ratios are f'."""
        log_ratio = rewards.log_ratio_rewards(evidence, 1.0)
        chosen, rejected = (rewards.divergence_score(side, self.divergence, self.alpha) for side in log_ratio)
        n_w, n_l, zero = evidence.policy.chosen_length, evidence.policy.rejected_length, torch.zeros_like(chosen)
        return evidence._replace(
            policy=PairLogps(chosen, rejected, n_w, n_l), reference=PairLogps(zero, zero, n_w, n_l)
        )


@dataclass(frozen=True, kw_only=True)
class LDDPO(OtherEvidence):
    """LD-DPO: what the longer completion has more of counts less, log π ← log π(shared) + α log π(rest).

    Shared are the first min(n_w, n_l) tokens of both completions, under policy and reference alike.

    Args:
        loss: a loss on log-ratios; its rewards are those of the weighted log-probabilities.
        alpha: α in [0, 1], weight of the tokens beyond the shared length; 1 is the loss itself, 0 ignores the rest.

    Source:
        LD-DPO, arXiv 2409.06411.
    """

    name: ClassVar[str] = "ld_dpo"
    formula: ClassVar[str] = "loss with log π = log π(first min(n_w, n_l) tokens) + α log π(rest), likewise π_ref"
    source: ClassVar[str] = "LD-DPO, arXiv 2409.06411"
    needs_shared: ClassVar[bool] = True

    loss: Loss = field(default_factory=DPO)
    alpha: float = 0.5

    def __post_init__(self) -> None:
        """Check the options."""
        fits = isinstance(self.loss, (LogRatioRewards, PairwiseLoss, FDPO)) and self.loss.needs_reference
        require(fits, "ld_dpo.loss", self.loss.name, "a loss on log-ratios (dpo, ipo, kto_pair, f_dpo, ...)")
        require(0 <= self.alpha <= 1, "ld_dpo.alpha", self.alpha, "0 <= α <= 1")

    def seen(self, evidence: Evidence) -> Evidence:
        """Both models' log-probabilities with the rest weighted by α."""
        policy, reference = self._weighted(evidence.policy), self._weighted(evidence.reference)
        return evidence._replace(policy=policy, reference=reference)

    def _weighted(self, logps: PairLogps | None) -> PairLogps:
        chosen, rejected = known(logps, "shared", self)
        assert logps is not None
        return logps._replace(
            chosen=torch.lerp(chosen, logps.chosen, self.alpha),
            rejected=torch.lerp(rejected, logps.rejected, self.alpha),
        )


@dataclass(frozen=True, kw_only=True)
class WPO(Wrapper):
    """WPO: w_w w_l loss: pairs that the policy would write itself count more.

    w = exp(mean over the completion's tokens of log p(y_t) - log Σ_v p(v)²) without graph: the completion's
    likelihood relative to what a sample from the policy has. γ acts inside of the loss.

    Args:
        loss: any loss that stands beside its pair.

    Source:
        WPO, arXiv 2406.11827, with sampled alignment, as TRL 1.16 has it.
    """

    name: ClassVar[str] = "wpo"
    formula: ClassVar[str] = "w_w w_l loss(γ), w = exp(mean_t [log p(y_t) - log Σ_v p(v)²])"
    source: ClassVar[str] = "WPO, arXiv 2406.11827"
    needs_on_policy: ClassVar[bool] = True

    loss: Loss = field(default_factory=DPO)

    def __post_init__(self) -> None:
        """Check the loss."""
        require(not self.loss.matches_pairs, "wpo.loss", self.loss.name, "a loss that matches no pairs with others")

    def of_pairs(self, evidence: Evidence, target_margin: Tensor, ranks: Ranks | None) -> Tensor:
        """Weigh each pair."""
        chosen, rejected = known(evidence.policy, "on_policy", self)
        return torch.exp((chosen + rejected).detach()) * self.loss(evidence, target_margin, ranks)


@dataclass(frozen=True, kw_only=True)
class WithSFT(Wrapper):
    """Any loss plus λ times the chosen completion's negative log-likelihood per token: loss - λ a/n_w.

    Args:
        loss: the preference loss; its rewards are the rewards.
        sft_weight: λ > 0, weight of the likelihood term.

    Source:
        RPO, arXiv 2404.19733, its loss with DPO.
    """

    name: ClassVar[str] = "with_sft"
    formula: ClassVar[str] = "loss - λ a/n_w"
    source: ClassVar[str] = "RPO, arXiv 2404.19733"

    loss: Loss
    sft_weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the options."""
        require_positive(self, "sft_weight")

    def of_pairs(self, evidence: Evidence, target_margin: Tensor, ranks: Ranks | None) -> Tensor:
        """The loss and the likelihood of the chosen completion."""
        return self.loss(evidence, target_margin, ranks) - self.sft_weight * evidence.policy.mean_chosen
