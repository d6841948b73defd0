"""The methods of the tuned protocol (P2), each with a grid of the same number of configurations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from gamma_po.errors import require
from gamma_po.losses import DPO, IPO, RobustDPO, SimPO
from gamma_po.margins import KL, Fixed, Map, Reverse, Shuffled
from gamma_po.margins.maps import Linear
from gamma_po.studies.settings import Setting

Config = tuple[float, ...]  # a value for every axis, in the order of the method's axes


class Axis(NamedTuple):
    """The values of one option, increasing, evenly spaced in the logarithm."""

    name: str
    values: tuple[float, ...]
    limit: float = math.inf  # the option stays below

    def extended(self, value: float) -> float | None:
        """Return the next value outside if `value` is at an end, None elsewhere or beyond the limit."""
        ratio = self.values[1] / self.values[0]
        low, high = min(value, self.values[0]), max(value, self.values[-1])
        if value <= low:
            return value / ratio
        if value >= high and value * ratio < self.limit:
            return value * ratio
        return None


class Gridded(Protocol):
    """What has a grid."""

    @property
    def axes(self) -> tuple[Axis, ...]:
        """What is tuned; the first is β, the second the learning rate."""
        ...


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method to be tuned.

    Args:
        name: in the tables.
        axes: what is tuned; the first is β, the second the learning rate.
        build: arm name, flip rate and a value per axis -> setting.
        against: methods it is compared with.
        control: name of the matched-slope control fitted to its tuned configuration.
    """

    name: str
    axes: tuple[Axis, ...]
    build: Callable[[str, float, Config], Setting]
    against: tuple[str, ...] = ("dpo",)
    control: str | None = None

    def configurations(self) -> list[Config]:
        """All combinations."""
        return list(itertools.product(*(axis.values for axis in self.axes)))


def geometric(first: float, ratio: float, count: int) -> tuple[float, ...]:
    """Return first, first · ratio, ..., rounded to three digits.

    >>> geometric(0.01, 4, 4)
    (0.01, 0.04, 0.16, 0.64)
    """
    return tuple(float(f"{first * ratio**k:.3g}") for k in range(count))


def _two() -> tuple[Axis, ...]:
    return Axis("beta", geometric(0.005, 2, 8)), Axis("learning_rate", geometric(0.001, 2, 6))


def _three(name: str, values: tuple[float, ...], limit: float = math.inf) -> tuple[Axis, ...]:
    return (
        Axis("beta", geometric(0.01, 4, 4)),
        Axis("learning_rate", geometric(0.001, 2.5, 4)),
        Axis(name, values, limit),
    )


def _four() -> tuple[Axis, ...]:
    return (
        Axis("beta", geometric(0.01, 4, 4)), Axis("learning_rate", geometric(0.001, 4, 3)),
        Axis("gamma0", (0.5, 2.0)), Axis("gamma0_over_tau", (0.5, 2.0)),
    )  # fmt: skip


def _plain(name: str, flips: float, c: Config) -> Setting:
    return Setting(arm=name, loss=DPO(beta=c[0]), learning_rate=c[1], flip_rate=flips)


def _oracle(name: str, flips: float, c: Config) -> Setting:
    return Setting(arm=name, loss=DPO(beta=c[0]), learning_rate=c[1], flip_rate=flips, mask="flipped")


def _ipo(name: str, flips: float, c: Config) -> Setting:
    return Setting(arm=name, loss=IPO(beta=c[0]), learning_rate=c[1], flip_rate=flips)


def _fixed(name: str, flips: float, c: Config) -> Setting:
    return Setting(arm=name, loss=DPO(beta=c[0]), margin=Fixed(gamma=c[2]), learning_rate=c[1], flip_rate=flips)


def _simpo(name: str, flips: float, c: Config) -> Setting:
    return Setting(arm=name, loss=SimPO(beta=c[0]), margin=Fixed(gamma=c[2]), learning_rate=c[1], flip_rate=flips)


def _map(name: str, flips: float, c: Config) -> Setting:
    return Setting(arm=name, loss=DPO(beta=c[0]), margin=Map(budget=c[2]), learning_rate=c[1], flip_rate=flips)


def _linear_map(name: str, flips: float, c: Config) -> Setting:
    """DPO with a constant margin and the reference π_ref^(1 + k / (β σ)), σ the deviation of the reference margins."""
    margin = Map(shape=Linear(g0=0.0, k=c[2]), standardize="z")
    return Setting(arm=name, loss=DPO(beta=c[0]), margin=margin, learning_rate=c[1], flip_rate=flips)


def _cdpo(name: str, flips: float, c: Config) -> Setting:
    return Setting(arm=name, loss=DPO(beta=c[0], label_smoothing=c[2]), learning_rate=c[1], flip_rate=flips)


def _robust(name: str, flips: float, c: Config) -> Setting:
    return Setting(arm=name, loss=RobustDPO(beta=c[0], label_smoothing=c[2]), learning_rate=c[1], flip_rate=flips)


def _kl_margin(c: Config, *, center: bool) -> KL:
    return KL(gamma0=c[2], tau=c[2] / c[3], center=center)


def _kl(name: str, flips: float, c: Config) -> Setting:
    margin = _kl_margin(c, center=True)
    return Setting(arm=name, loss=DPO(beta=c[0]), margin=margin, learning_rate=c[1], flip_rate=flips)


def _kl_absolute(name: str, flips: float, c: Config) -> Setting:
    margin = _kl_margin(c, center=False)
    return Setting(arm=name, loss=DPO(beta=c[0]), margin=margin, learning_rate=c[1], flip_rate=flips)


def _kl_reversed(name: str, flips: float, c: Config) -> Setting:
    margin = Reverse(inner=_kl_margin(c, center=True))
    return Setting(arm=name, loss=DPO(beta=c[0]), margin=margin, learning_rate=c[1], flip_rate=flips)


def _kl_shuffled(name: str, flips: float, c: Config) -> Setting:
    margin = Shuffled(inner=_kl_margin(c, center=True))
    return Setting(arm=name, loss=DPO(beta=c[0]), margin=margin, learning_rate=c[1], flip_rate=flips)


def _gamma_simpo(name: str, flips: float, c: Config) -> Setting:
    margin = _kl_margin(c, center=False)
    return Setting(arm=name, loss=SimPO(beta=c[0]), margin=margin, learning_rate=c[1], flip_rate=flips)


MARGINS_FIXED, SMOOTHING, BUDGETS = (0.25, 1.0, 4.0), (0.1, 0.2, 0.4), (0.1, 0.4, 1.6)
SLOPES = (0.1, 0.4, 1.6)
METHODS = {
    method.name: method
    for method in (
        Method(name="dpo", axes=_two(), build=_plain, against=()),
        Method(name="fixed", axes=_three("gamma", MARGINS_FIXED), build=_fixed),
        Method(name="kl", axes=_four(), build=_kl, control="kl, matched slope",
               against=("dpo", "fixed", "kl shuffled", "kl, matched slope")),
        Method(name="kl absolute", axes=_four(), build=_kl_absolute, control="kl absolute, matched slope",
               against=("dpo", "fixed", "kl absolute, matched slope")),
        Method(name="kl reversed", axes=_four(), build=_kl_reversed),
        Method(name="kl shuffled", axes=_four(), build=_kl_shuffled),
        Method(name="map", axes=_three("budget", BUDGETS), build=_map, control="map, matched slope",
               against=("dpo", "fixed", "map, matched slope")),
        Method(name="linear map", axes=_three("slope", SLOPES), build=_linear_map, control="linear map, matched slope",
               against=("dpo", "map", "linear map, matched slope")),
        Method(name="ipo", axes=_two(), build=_ipo),
        Method(name="cdpo", axes=_three("label_smoothing", SMOOTHING, 0.5), build=_cdpo),
        Method(name="robust_dpo", axes=_three("label_smoothing", SMOOTHING, 0.5), build=_robust),
        Method(name="simpo", axes=_three("gamma", MARGINS_FIXED), build=_simpo),
        Method(name="γ-simpo", axes=_four(), build=_gamma_simpo, control="γ-simpo, matched slope",
               against=("simpo", "dpo", "γ-simpo, matched slope")),
        Method(name="oracle: no flipped pairs", axes=_two(), build=_oracle),
    )
}  # fmt: skip


def methods(names: tuple[str, ...]) -> list[Method]:
    """Return methods by name.

    Raises:
        ConfigError: an unknown name.
    """
    for name in names:
        require(name in METHODS, "method", name, ", ".join(METHODS))
    return [METHODS[name] for name in names]


def neighbourhood(method: Gridded, best: Config) -> list[Config]:
    """Return the configurations one step beyond the ends of the grid at which `best` lies.

    The other options stay as they are, except that β and the learning rate, which can stand in for each other, are
    also taken one grid step away.
    """
    found = []
    for number, axis in enumerate(method.axes):
        outside = axis.extended(best[number])
        if outside is None:
            continue
        moved = [*best[:number], outside, *best[number + 1 :]]
        partner = 0 if number == 1 else 1
        if partner == len(best):  # a single option
            found.append(tuple(moved))
            continue
        for value in _near(method.axes[partner], best[partner]):
            found.append((*moved[:partner], value, *moved[partner + 1 :]))
    return list(dict.fromkeys(found))


def at_edges(method: Gridded, best: Config, tried: set[Config]) -> list[str]:
    """Name the options whose best value is the smallest or largest that was tried."""
    found = []
    for number, axis in enumerate(method.axes):
        values = sorted({config[number] for config in tried})
        if best[number] in (values[0], values[-1]):
            found.append(f"{axis.name}={best[number]:.3g}")
    return found


def _near(axis: Axis, value: float) -> tuple[float, ...]:
    index = min(range(len(axis.values)), key=lambda i: abs(math.log(axis.values[i] / value)))
    picked = {value, *axis.values[max(0, index - 1) : index + 2]}
    return tuple(sorted(picked))
