"""Policies of many runs side by side: a two-layer network per run, its gradient, and Adam.

Runs do not touch each other: a run's numbers are those it has alone, up to rounding.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gamma_po.studies.worlds import generator_of

ROWS_AT_ONCE = 128
BETAS, EPSILON = (0.9, 0.999), 1e-8


class Network(NamedTuple):
    """f(x) = out · relu(weight x), with a constant 1 appended to x; W worlds, S settings, H units."""

    weight: Tensor  # [W, S, F + 1, H]
    out: Tensor  # [W, S, H]


class Adam(NamedTuple):
    """Moments of Adam for one tensor."""

    first: Tensor
    second: Tensor


def initial(seeds: tuple[int, ...], settings: int, features: int, units: int) -> Network:
    """Return networks with f = 0: random first layers, the same for all settings of a seed, and out = 0."""
    layers = []
    for seed in seeds:
        generator = generator_of(seed, 1)
        layers.append(torch.randn(features + 1, units, generator=generator) / math.sqrt(features + 1))
    weight = torch.stack(layers)[:, None].expand(-1, settings, -1, -1).contiguous()
    return Network(weight, weight.new_zeros(len(seeds), settings, units))


def with_constant(x: Tensor) -> Tensor:
    """Append the constant feature, [..., F] -> [..., F + 1]."""
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)


def scores(network: Network, x: Tensor) -> Tensor:
    """Return f, [W, S, B]. Worlds are taken one by one, so that the hidden layer stays in the processor's cache.

    Args:
        network: of all runs.
        x: features with the constant, [W, B, F + 1], shared by the settings of a world.
    """
    found = []
    for world, rows in enumerate(x):
        weight, out = network.weight[world], network.out[world][..., None]
        parts = [torch.matmul(torch.matmul(part, weight).relu_(), out)[..., 0] for part in rows.split(ROWS_AT_ONCE)]
        found.append(torch.cat(parts, dim=1))
    return torch.stack(found)


def gradients(network: Network, x: Tensor, of_scores: Tensor) -> Network:
    """Return Σ_b of_scores_b ∂f_b/∂parameters; the hidden layer is computed again rather than kept.

    Args:
        network: of all runs.
        x: as for `scores`.
        of_scores: ∂loss/∂f, [W, S, B].
    """
    weight, out = torch.empty_like(network.weight), torch.empty_like(network.out)
    for world, rows in enumerate(x):
        hidden = torch.matmul(rows, network.weight[world]).relu_()
        pull = of_scores[world]
        out[world] = torch.matmul(pull[:, None, :], hidden)[:, 0]
        active = hidden.sign_()
        torch.matmul(rows.T * pull[:, None, :], active, out=weight[world])
        weight[world] *= network.out[world][:, None, :]
    return Network(weight, out)


class Optimizer:
    """Adam with a learning rate per setting (torch's has one per tensor).

    Args:
        network: updated in place.
        learning_rate: [S].
    """

    def __init__(self, network: Network, learning_rate: Tensor) -> None:
        self.network, self.steps = network, 0
        self.rates = (learning_rate[None, :, None, None], learning_rate[None, :, None])
        self.moments = tuple(Adam(torch.zeros_like(p), torch.zeros_like(p)) for p in network)

    def step(self, gradient: Network, factor: float) -> None:
        """Take one step with the learning rates times `factor`."""
        self.steps += 1
        bias_first, bias_second = (1 - beta**self.steps for beta in BETAS)
        for parameter, g, moment, rate in zip(self.network, gradient, self.moments, self.rates, strict=True):
            moment.first.lerp_(g, 1 - BETAS[0])
            moment.second.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
            change = moment.first / (moment.second.sqrt() / math.sqrt(bias_second) + EPSILON)
            parameter.sub_(change.mul_(rate * (factor / bias_first)))
