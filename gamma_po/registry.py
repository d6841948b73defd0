"""Build what a registry names, and turn what was built back into plain values for checkpoints."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, TypeVar

from gamma_po.errors import ConfigError

Built = TypeVar("Built")


def build(factory: type[Built], name: str, options: dict[str, Any]) -> Built:
    """Instantiate `factory` with `options`.

    Raises:
        ConfigError: an option that `factory` does not have, naming those it has.
    """
    known = inspect.signature(factory).parameters
    for option in options:
        if option not in known:
            allowed = ", ".join(known) or "none"
            raise ConfigError(f"{name} does not use the option {option!r}; its options: {allowed}")
    return factory(**options)


def plain_config(value: Any, *, with_class_path: tuple[type, ...]) -> Any:
    """Turn dataclass instances into plain dicts, as LightningCLI reads them.

    Args:
        value: anything.
        with_class_path: instances of these become `{"class_path": ..., "init_args": ...}`, others just their fields.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: plain_config(getattr(value, f.name), with_class_path=with_class_path)
            for f in dataclasses.fields(value)
        }
        if not isinstance(value, with_class_path):
            return fields
        return {"class_path": f"{type(value).__module__}.{type(value).__qualname__}", "init_args": fields}
    if isinstance(value, (list, tuple)):
        return [plain_config(item, with_class_path=with_class_path) for item in value]
    return value
