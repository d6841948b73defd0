"""Label noise: which pairs have their labels swapped."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from gamma_po.errors import ConfigError, require

RANDOM_BITS = 53  # as many as a float holds


def check_label_noise(rate: float, seed: int) -> None:
    """Refuse a rate that is no probability, and a seed of flips where there are none.

    Raises:
        ConfigError: naming the options and what is allowed.
    """
    require(0 <= rate <= 1, "data.label_noise", rate, "a probability in [0, 1]")
    if rate == 0 and seed != 0:
        raise ConfigError(
            f"data.label_noise_seed={seed} is not used: data.label_noise={rate} flips no label; "
            "allowed: data.label_noise above 0, or no data.label_noise_seed"
        )


def flip_mask(num_pairs: int, rate: float, seed: int) -> Tensor:
    """Choose pairs whose chosen and rejected completions are to be swapped.

    Pair i is flipped if u(seed, i) < rate, with u uniform on [0, 1) and independent between pairs. So the
    flips depend neither on how many pairs follow nor on any global random state, and with the same seed a
    higher rate flips the pairs of a lower one and more.

    Args:
        num_pairs: P >= 0.
        rate: probability of a flip, in [0, 1].
        seed: any integer.

    Returns:
        True where flipped, bool, [P].

    Raises:
        ConfigError: the rate is outside [0, 1].

    >>> flip_mask(3, 1.0, seed=0).tolist()
    [True, True, True]
    """
    if not 0 <= rate <= 1:
        raise ConfigError(f"label noise rate must lie in [0, 1], found {rate}")
    return torch.tensor([uniform(f"label noise {seed} {i}") < rate for i in range(num_pairs)], dtype=torch.bool)


def uniform(name: str) -> float:
    """Return a number in [0, 1) that looks random and is a function of a name, the same on every machine.

    >>> uniform("label noise 0 0") == uniform("label noise 0 0")
    True
    """
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> (64 - RANDOM_BITS)) * 2.0**-RANDOM_BITS
