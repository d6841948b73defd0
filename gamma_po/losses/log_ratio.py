"""DPO's reward margin under other links: squared (IPO), hinge, reverse KL (EXO) and a discovered one (DiscoPOP)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gamma_po import links, rewards
from gamma_po.errors import require
from gamma_po.losses.base import LogRatioRewards, PairwiseLoss, require_positive
from gamma_po.types import Evidence, PairRewards


@dataclass(frozen=True, kw_only=True)
class IPO(PairwiseLoss):
    """Identity preference optimization: (d - 1/(2β) - γ/β)², d = r_w/n_w - r_l/n_l or r_w - r_l.

    In reward units, h = β d, this is ((h - γ - 1/2) / β)²: smallest at γ = h - 1/2.

    Args:
        beta: reward units per nat, > 0; 1/(2β) is the log-ratio gap that IPO aims for without a margin.
        length_norm: divide log-ratios by token counts, as its authors do.

    Source:
        arXiv 2310.12036, eq. 17.
    """

    name: ClassVar[str] = "ipo"
    formula: ClassVar[str] = "(d - 1/(2β) - γ/β)², d = r_w/n_w - r_l/n_l (length_norm) or r_w - r_l"
    source: ClassVar[str] = "arXiv 2310.12036"

    beta: float = 0.1
    length_norm: bool = True

    def __post_init__(self) -> None:
        """Check the options."""
        require_positive(self, "beta")

    def rewards(self, evidence: Evidence) -> PairRewards:
        """β (log π - log π_ref), per token if `length_norm`."""
        reward = rewards.mean_log_ratio_rewards if self.length_norm else rewards.log_ratio_rewards
        return reward(evidence, self.beta)

    def link(self, reward_margin: Tensor, target_margin: Tensor) -> Tensor:
        """Squared distance to the target, in nats."""
        return links.squared((reward_margin - target_margin) / self.beta, target_margin.new_tensor(0.5 / self.beta))


@dataclass(frozen=True, kw_only=True)
class Hinge(LogRatioRewards, PairwiseLoss):
    """Hinge loss: max(0, 1 + γ - h), h = β (r_w - r_l).

    Args:
        beta: reward units per nat, > 0; without a margin the log-ratio gap is pushed up to 1/β.

    Source:
        SLiC-HF, arXiv 2305.10425, its calibration loss; on log-ratios: RSO, arXiv 2309.06657, hinge-norm.
    """

    name: ClassVar[str] = "hinge"
    formula: ClassVar[str] = "max(0, 1 + γ - h), h = β (r_w - r_l)"
    source: ClassVar[str] = "SLiC arXiv 2305.10425, RSO arXiv 2309.06657"

    beta: float = 0.1

    def link(self, reward_margin: Tensor, target_margin: Tensor) -> Tensor:
        """Hinge."""
        return links.hinge(reward_margin, target_margin)


@dataclass(frozen=True, kw_only=True)
class EXOPair(LogRatioRewards, PairwiseLoss):
    """Efficient exact optimization of a pair: KL of (s(x), s(-x)) from (1 - ε, ε), x = h - γ, h = β (r_w - r_l).

    Not monotone in γ: smallest at γ = h - log((1 - ε)/ε).

    Args:
        beta: reward units per nat, > 0.
        label_smoothing: ε in (0, 0.5), the share of labels assumed wrong; at 0 the KL is infinite.

    Source:
        EXO, arXiv 2402.00856, eq. 16.
    """

    name: ClassVar[str] = "exo_pair"
    formula: ClassVar[str] = "KL((s(x), s(-x)) ‖ (1-ε, ε)), x = h-γ, h = β (r_w - r_l)"
    source: ClassVar[str] = "EXO, arXiv 2402.00856"

    beta: float = 0.1
    label_smoothing: float = 1e-3

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        require(0 < self.label_smoothing < 0.5, "exo_pair.label_smoothing", self.label_smoothing, "0 < ε < 0.5")

    def link(self, reward_margin: Tensor, target_margin: Tensor) -> Tensor:
        """Reverse KL to the smoothed label."""
        return links.reverse_kl(reward_margin, target_margin, self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class DiscoPOP(LogRatioRewards, PairwiseLoss):
    """Discovered preference optimization: (1 - m) ℓ(x) + m exp(-x), m = s(x/τ), x = h - γ, h = β (r_w - r_l).

    Not monotone in γ: with τ = 0.05 it has a local minimum at h - γ = -0.119 and a local maximum at 0.072.

    Args:
        beta: reward units per nat, > 0.
        tau: temperature τ in (0, 1], reward units; beyond 1 the loss would be exponential for wrong pairs.

    Source:
        DiscoPOP, arXiv 2406.08414, eq. 5.
    """

    name: ClassVar[str] = "discopop"
    formula: ClassVar[str] = "(1-m) ℓ(x) + m exp(-x), m = s(x/τ), x = h-γ, h = β (r_w - r_l)"
    source: ClassVar[str] = "DiscoPOP, arXiv 2406.08414"

    beta: float = 0.1
    tau: float = 0.05

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        require(0 < self.tau <= 1, "discopop.tau", self.tau, "0 < τ <= 1")

    def link(self, reward_margin: Tensor, target_margin: Tensor) -> Tensor:
        """Log-ratio modulated."""
        return links.log_ratio_modulated(reward_margin, target_margin, self.tau)
