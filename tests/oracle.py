"""The whole step again, naively and in float64: no batching, no fused projection, textbook formulas.

Nothing here calls the package's mathematics, so agreement means something.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from gamma_po.data.tokenization import TokenizedPair


def sequence_logp(model: nn.Module, prompt: Tensor, completion: Tensor) -> Tensor:
    """Σ_t log softmax(logits_t)[y_t], one sequence at a time, from the model's full logits."""
    tokens = torch.cat([prompt, completion]).long()[None]
    logits = model(input_ids=tokens, use_cache=False).logits[0]
    total = logits.new_zeros(())
    for t in range(len(completion)):
        row = logits[len(prompt) + t - 1]
        probabilities = torch.exp(row - row.max())
        total = total + torch.log(probabilities[int(completion[t])] / probabilities.sum())
    return total


def token_logps(model: nn.Module, prompt: Tensor, completion: Tensor) -> tuple[Tensor, Tensor]:
    """log p(y_t) and log Σ_v p_t(v)² at every token of a completion, from the model's full logits."""
    tokens = torch.cat([prompt, completion]).long()[None]
    rows = model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1]
    p = torch.softmax(rows, dim=1)
    return torch.log(p[range(len(completion)), completion.long()]), torch.log((p * p).sum(dim=1))


def pair_logps(model: nn.Module, pairs: list[TokenizedPair]) -> tuple[Tensor, Tensor]:
    """Chosen and rejected log-probabilities of all pairs."""
    chosen = torch.stack([sequence_logp(model, pair.prompt, pair.chosen) for pair in pairs])
    rejected = torch.stack([sequence_logp(model, pair.prompt, pair.rejected) for pair in pairs])
    return chosen, rejected


def double(model: nn.Module) -> nn.Module:
    """A float64 copy in eval mode."""
    return copy.deepcopy(model).double().eval()


def log_sigmoid(x: Tensor) -> Tensor:
    """log(1 / (1 + e^-x)), as printed in the papers."""
    return torch.log(1 / (1 + torch.exp(-x)))


def kl_margins(h: list[float], gamma0: float, tau: float) -> list[float]:
    """γ of the allocation problem by bisection over the price of margin, with bisection for each pair inside.

    At the optimum all pairs have the same marginal cost: γ0 σ(γ_i - h_i) + τ (1 + log q_i) = price.
    """

    def share(price: float, h_i: float) -> float:
        low, high = -800.0, 50.0  # log q
        for _ in range(200):
            middle = (low + high) / 2
            gamma = gamma0 * math.exp(middle)
            cost = gamma0 / (1 + math.exp(min(700.0, h_i - gamma))) + tau * (1 + middle)
            low, high = (middle, high) if cost < price else (low, middle)
        return math.exp((low + high) / 2)

    low, high = tau - 1.0, tau + gamma0 + 1.0
    for _ in range(200):
        price = (low + high) / 2
        mean = sum(share(price, h_i) for h_i in h) / len(h)
        low, high = (price, high) if mean < 1 else (low, price)
    return [gamma0 * share((low + high) / 2, h_i) for h_i in h]
