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
