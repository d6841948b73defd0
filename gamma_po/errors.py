"""The two errors a user of this package can cause: a wrong configuration or wrong data."""

from collections.abc import Iterable


class ConfigError(ValueError):
    """A configuration that cannot work: names the option, its value and what is allowed."""


class DataError(ValueError):
    """Data that cannot be used: names the file, the row and what is allowed."""


def unknown_name(kind: str, name: str, allowed: Iterable[str]) -> ConfigError:
    """Return the error for a name that is not in a registry, listing what is allowed.

    >>> str(unknown_name("loss", "dop", ["dpo", "ipo"]))
    "unknown loss 'dop'; allowed: dpo, ipo"
    """
    return ConfigError(f"unknown {kind} {name!r}; allowed: {', '.join(sorted(allowed))}")


def require(condition: bool, option: str, value: object, allowed: str) -> None:
    """Raise a ConfigError naming the option unless the condition holds."""
    if not condition:
        raise ConfigError(f"{option}={value!r} is not allowed; allowed: {allowed}")


def require_integer(option: str, value: object, at_least: int | None = None, limit: str | None = None) -> None:
    """Raise a ConfigError naming the option unless its value is an integer, no float and no bool, of that size.

    Args:
        option: as users write it.
        value: what they gave.
        at_least: smallest value allowed; None for any integer.
        limit: what the message calls `at_least`, where that is another option.

    >>> require_integer("Dual.window", 512.0, at_least=1)
    Traceback (most recent call last):
    gamma_po.errors.ConfigError: Dual.window=512.0 is not allowed; allowed: an integer >= 1
    """
    fits = isinstance(value, int) and not isinstance(value, bool) and (at_least is None or value >= at_least)
    require(fits, option, value, "an integer" if at_least is None else f"an integer >= {limit or at_least}")
