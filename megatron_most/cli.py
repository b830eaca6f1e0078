"""Shared by all commands: one-line errors, ``--debug`` for the traceback, exit status 0 only on success."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence

from megatron_most.errors import ConfigError, MostError, first_line, shown
from megatron_most.extras import MissingExtra, is_optional
from megatron_most.keys import LARGEST_INTEGER
from megatron_most.processes import INTERRUPTED, SPOKEN_FOR

STOPPED = 75
"""Exit status of training that was asked to stop and has saved: run the command again to go on (EX_TEMPFAIL)."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Signals that ask training to finish its step, save, and end with that status."""

_DEBUG_HELP = "show the traceback of errors"


def make_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """A parser whose usage says ``most COMMAND``, however it was started; the description keeps its line breaks."""
    return argparse.ArgumentParser(
        prog=f"most {command}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def run(
    parser: argparse.ArgumentParser,
    command: Callable[[argparse.Namespace], None],
    arguments: Sequence[str] | None = None,
) -> None:
    """Parse ``arguments`` (default: those of ``sys.argv``) and call ``command``; failures exit with a status above 0.

    A :class:`MostError` or a missing optional package becomes one line on stderr and exit status 1; with ``--debug``,
    before or after a subcommand, it propagates. As shells expect, Ctrl-C exits with 130 and a closed pipe (``| head``)
    with 141. Under ``torchrun``, errors also go where it looks for them.
    """
    options = parse(parser, arguments)
    try:
        command(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes standard output again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (Exception, KeyboardInterrupt) as error:
        if _is_interrupt(error):
            # Ranks leave it to torchrun to speak.
            if SPOKEN_FOR not in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
                print("interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED)
        line = _one_line(error, parser.prog)
        tell_torchrun(line or f"{type(error).__name__}: {first_line(error)}")
        if options.debug or line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(1)


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse as :func:`run` does. The parser gets the option ``--debug``: call this once for each parser."""
    inner = subparsers(parser)
    parser.add_argument("--debug", action="store_true", help=_DEBUG_HELP)
    for subparser in inner:
        # Without SUPPRESS, the default of a subparser would undo a --debug before the subcommand.
        subparser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=_DEBUG_HELP)
    # Intermixed parsing allows options between positional arguments; argparse cannot combine it with subparsers.
    return parser.parse_args(arguments) if inner else parser.parse_intermixed_args(arguments)


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether this is Ctrl-C, or what a library made of it: an extension module that is being imported, for example."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def tell_torchrun(message: str) -> None:
    """Write the file whose message ``torchrun`` quotes in its own report (its ErrorHandler defines the format)."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        more = {"py_callstack": message, "timestamp": str(int(time.time()))}
        try:
            with open(path, "w", encoding="utf-8") as file:
                json.dump({"message": {"message": message, "extraInfo": more}}, file)
        except OSError:
            pass  # the error itself is more important


def _one_line(error: BaseException, command: str) -> str | None:
    """The line for an error that a user can cause; None for any other error."""
    module = getattr(error, "name", None)
    if module is not None and is_optional(module):
        error = MissingExtra(module, command)
    return str(error) if isinstance(error, MostError) else None


def require_positive(arguments: argparse.Namespace, *names: str) -> None:
    """Raise :class:`ConfigError` for the first of these options that is set, but not to a finite number above 0."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')}={value}: must be greater than 0")


def launcher_integer(name: str, default: int, least: int = 0) -> int:
    """An integer that torchrun or SLURM sets in the environment, such as ``RANK``.

    Raises:
        ConfigError: the variable holds anything but an integer from ``least`` to 2^31 - 1.
    """
    text = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,10}", text) or not least <= int(text) <= LARGEST_INTEGER:
        raise ConfigError(f"environment variable {name}={shown(text)}: must be an integer of at least {least}")
    return int(text)


def subparsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parsers of the subcommands; argparse has them only as the choices of an action."""
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [subparser for action in actions for subparser in dict.fromkeys(action.choices.values())]
