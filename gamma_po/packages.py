"""Find files inside installed Python packages without importing them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from gamma_po.errors import ConfigError

PACKAGE_PREFIX = "package:"


def package_file(path: str, *, suffix: str | None = None) -> Path:
    """Return the file that `package:NAME/inner/file` or `package:NAME` points to.

    Args:
        path: `package:NAME/inner/file`; with a suffix also `package:NAME` for the only such file at the top of
            the package.
        suffix: e.g. ".gguf".

    Raises:
        ConfigError: the package is not installed, or the file is not in it.
    """
    name, _, inner = path.removeprefix(PACKAGE_PREFIX).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"{path}: no package {name!r} is installed")
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    if inner or suffix is None:
        found = [folder / inner for folder in folders if (folder / inner).is_file()]
        if not found:
            raise ConfigError(f"{path}: the package {name!r} has no file {inner!r}")
        return found[0]
    found = sorted(file for folder in folders for file in folder.glob(f"*{suffix}"))
    if len(found) != 1:
        raise ConfigError(f"{path}: expected exactly one {suffix} file in the package {name!r}, found {len(found)}")
    return found[0]
