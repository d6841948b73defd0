"""Options of a command from its command line and YAML, with errors that say what is allowed."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from jsonargparse import ActionYesNo, ArgumentParser

from gamma_po.errors import ConfigError, DataError
from gamma_po.files import DISK_ADVICE, disk_refuses
from gamma_po.parsing import explain, refusal
from gamma_po.rundirs import why_not_writable

Options = TypeVar("Options")
Names = Sequence[tuple[str, str]]  # options of `fit` as messages name them (patterns), and how a command calls them
LESS_MEMORY = "A smaller batch size, a smaller dtype or the CPU as the device may help."


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


def parse(
    kind: type[Options], arguments: list[str], command: str, *, flags: tuple[str, ...] = (), names: Names = ()
) -> Options:
    """Return a command's options; what is wrong with them ends the program with status 2.

    Args:
        kind: a dataclass of options; its docstring is the help.
        arguments: the command line after the command.
        command: its name.
        flags: options of truth values that may stand alone, e.g. `--interactive`.
        names: as for `guarded`.
    """
    description = (sys.modules[kind.__module__].__doc__ or "").partition("\n")[0]
    parser = CommandParser(prog=f"python -m gamma_po {command}", description=description, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="Options from a YAML file.")
    parser.add_class_arguments(kind, skip=set(flags))
    for name in flags:
        default = next(field.default for field in fields(kind) if field.name == name)
        parser.add_argument(f"--{name}", action=ActionYesNo(yes_prefix="", no_prefix="no_"), default=default)
    try:
        values = parser.instantiate_classes(parser.parse_args(arguments))
    except ValueError as error:
        sys.stderr.write(f"error: {renamed(refusal(str(error)), names)}\n")
        raise SystemExit(2) from error
    return kind(**{field.name: values[field.name] for field in fields(kind)})


def short_path(arguments: list[str], name: str) -> list[str]:
    """Let `--NAME PATH` stand for `--NAME.path PATH`.

    >>> short_path(["--policy=a", "--policy.dtype", "float32"], "policy")
    ['--policy.path=a', '--policy.dtype', 'float32']
    """
    option = f"--{name}"
    return [option + ".path" + w[len(option) :] if w.partition("=")[0] == option else w for w in arguments]


def refuse_unread(options: Any, defaults: Any, read: set[str], what: str) -> None:
    """Refuse options that were given and would do nothing.

    Args:
        options: of a command.
        defaults: the same as if nothing had been given.
        read: names of those that are used.
        what: uses no others, for the error.

    Raises:
        ConfigError: naming them.
    """
    names = [field.name for field in fields(options) if field.name not in read]
    unread = [name for name in names if getattr(options, name) != getattr(defaults, name)]
    if unread:
        raise ConfigError(f"{what} does not use {', '.join(f'--{name}' for name in unread)}")


def new_output(given: str) -> Path:
    """Return where a command's new file or folder goes, before the work for it begins.

    Raises:
        ConfigError: something is there already, or nothing can be written there.
    """
    path = Path(given).expanduser()
    if os.path.lexists(path):
        raise ConfigError(f"output={given!r} is there already, and nothing is replaced; give another name")
    reason = why_not_writable(path.absolute().parent)
    if reason is not None:
        raise ConfigError(f"output={given!r}: nothing can be written there: {reason}")
    return path


def renamed(message: str, names: Names) -> str:
    """Return a message with options under a command's own names.

    >>> renamed("data.tokenization.template='chat' is not allowed", [(r"data\\.tokenization\\.template=", "template=")])
    "template='chat' is not allowed"
    """
    for of_fit, own in names:
        message = re.sub(of_fit, own, message)
    return message


def guarded(work: Callable[[], int], *, names: Names = ()) -> int:
    """Run a command's work; wrong configuration or data ends in one plain message.

    Args:
        work: of the command.
        names: of options that this command calls differently from `fit`.

    Returns:
        What `work` returns; 2 after a wrong configuration or wrong data; 1 if the disk or the GPU is full; 130 if
        interrupted.
    """
    try:
        return work()
    except (ConfigError, DataError) as error:
        sys.stderr.write(f"error: {renamed(str(error), names)}\n")
        return 2
    except torch.OutOfMemoryError as error:
        sys.stderr.write(f"stopped: {str(error).splitlines()[0]} {LESS_MEMORY}\n")
        return 1
    except OSError as error:
        if not disk_refuses(error):
            raise
        sys.stderr.write(f"stopped: {error}; {DISK_ADVICE}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
