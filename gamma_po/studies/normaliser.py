"""log Z(x) of a bandit's policy π(y|x) = π_ref(y|x) exp f(x, y) / Z(x), an exact sum over the responses.

It cancels in the difference of two responses, which is all that most losses see. KTO judges each response on its own,
so its settings are trained with log Z, at the cost of scoring all responses of a step's prompts and not two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gamma_po.studies.network import Network, gradients, scores, with_constant
from gamma_po.studies.settings import Setting, needs_normaliser
from gamma_po.studies.worlds import Pairs


class Normalised(NamedTuple):
    """What the settings that need log Z are given at a step; G of them, the last of all."""

    members: slice  # their place among the settings
    log_z: Tensor  # [B, G, W] nats, a leaf
    policy: Tensor  # [W, G, B, K] π
    x: Tensor  # [W, B K, F + 1] features of all responses


def with_normaliser(settings: Sequence[Setting]) -> slice:
    """Return the place of the settings that need log Z, which `ordered` puts last."""
    first = sum(not needs_normaliser(setting.loss) for setting in settings)
    assert all(needs_normaliser(setting.loss) for setting in settings[first:]), "settings are put in order first"
    return slice(first, len(settings))


def normalised(network: Network, members: slice, pairs: Pairs, rows: Tensor) -> Normalised:
    """Return log Z of a step's prompts: logsumexp over y of log π_ref(y|x) + f(x, y).

    Args:
        network: of all settings.
        members: the settings that need it.
        pairs: N training pairs.
        rows: of the step, [W, B].
    """
    world = torch.arange(len(rows))[:, None]
    x = with_constant(pairs.responses[world, rows]).flatten(1, 2)
    raised = scores(_part(network, members), x).unflatten(2, (rows.shape[1], -1))
    raised = raised + pairs.reference[world, rows][:, None]
    log_z = raised.logsumexp(-1)
    leaf = log_z.permute(2, 1, 0).contiguous().requires_grad_()
    return Normalised(members, leaf, (raised - log_z[..., None]).exp(), x)


def add_gradient(gradient: Network, network: Network, found: Normalised, of_log_z: Tensor) -> None:
    """Add to the gradient what comes through log Z: ∂log Z(x)/∂f(x, y) = π(y|x).

    Args:
        gradient: of all settings; changed in place.
        network: of all settings.
        found: of this step.
        of_log_z: ∂loss/∂log Z, [B, G, W].
    """
    pull = of_log_z.permute(2, 1, 0)[..., None] * found.policy
    through = gradients(_part(network, found.members), found.x, pull.flatten(2))
    for whole, part in zip(gradient, through, strict=True):
        whole[:, found.members] += part


def _part(network: Network, members: slice) -> Network:
    return Network(*(layer[:, members] for layer in network))
