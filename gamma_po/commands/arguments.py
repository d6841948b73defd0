"""Options of a command from its command line and YAML, with errors that say what is allowed."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

from jsonargparse import ActionYesNo, ArgumentParser

from gamma_po.errors import ConfigError, DataError
from gamma_po.files import DISK_ADVICE, disk_refuses
from gamma_po.parsing import explain

Options = TypeVar("Options")


class CommandParser(ArgumentParser):
    """A parser of one command's options."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Exit with status 2 after the message and what is allowed."""
        known = [action.dest for action in self._actions]
        if found := re.search(r'[Kk]ey "(\w+)" is required|arguments are required: (\w+)', message):
            text = f"--{found[1] or found[2]} is required; see --help"
        else:
            text = explain(message, options=known, of_class=None)
        sys.stderr.write(f"error: {text}\n")
        raise SystemExit(2)


def parse(kind: type[Options], arguments: list[str], command: str, *, flags: tuple[str, ...] = ()) -> Options:
    """Return a command's options.

    Args:
        kind: a dataclass of options; its docstring is the help.
        arguments: the command line after the command.
        command: its name.
        flags: options of truth values that may stand alone, e.g. `--interactive`.
    """
    description = (sys.modules[kind.__module__].__doc__ or "").partition("\n")[0]
    parser = CommandParser(prog=f"python -m gamma_po {command}", description=description, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="Options from a YAML file.")
    parser.add_class_arguments(kind, skip=set(flags))
    for name in flags:
        default = next(field.default for field in fields(kind) if field.name == name)
        parser.add_argument(f"--{name}", action=ActionYesNo(yes_prefix="", no_prefix="no_"), default=default)
    values = parser.instantiate_classes(parser.parse_args(arguments))
    return kind(**{field.name: values[field.name] for field in fields(kind)})


def short_path(arguments: list[str], name: str) -> list[str]:
    """Let `--NAME PATH` stand for `--NAME.path PATH`.

    >>> short_path(["--policy=a", "--policy.dtype", "float32"], "policy")
    ['--policy.path=a', '--policy.dtype', 'float32']
    """
    option = f"--{name}"
    return [option + ".path" + w[len(option) :] if w.partition("=")[0] == option else w for w in arguments]


def guarded(work: Callable[[], int]) -> int:
    """Run a command's work; wrong configuration or data ends in one plain message.

    Returns:
        What `work` returns; 2 after a wrong configuration or wrong data; 1 if the disk is full; 130 if interrupted.
    """
    try:
        return work()
    except (ConfigError, DataError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except OSError as error:
        if not disk_refuses(error):
            raise
        sys.stderr.write(f"stopped: {error}; {DISK_ADVICE}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
