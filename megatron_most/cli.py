"""What every command shares: one-line errors, ``--debug`` for the traceback, exit status 0 only on success."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence

from megatron_most.errors import ConfigError, MostError
from megatron_most.extras import MissingExtra, is_optional

_DEBUG_HELP = "show the traceback of an error"


def make_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """A parser for ``most COMMAND``, which is called so however it was started; the description keeps its lines."""
    return argparse.ArgumentParser(
        prog=f"most {command}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def run(
    parser: argparse.ArgumentParser,
    command: Callable[[argparse.Namespace], None],
    arguments: Sequence[str] | None = None,
) -> None:
    """Parse ``arguments`` (default: ``sys.argv``'s), call ``command`` and leave the process with its status.

    A :class:`MostError`, or an optional package that is missing, becomes one line on stderr and exit status 1;
    ``--debug``, before or after a subcommand, lets it propagate instead.
    Ctrl-C exits with 130, and a reader that has closed the pipe (``| head``) with 141, as shells expect.
    """
    subparsers = _subparsers(parser)
    parser.add_argument("--debug", action="store_true", help=_DEBUG_HELP)
    for subparser in subparsers:
        # Suppressed: the default of a subparser would undo a --debug that stands before the subcommand.
        subparser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=_DEBUG_HELP)
    # Intermixed, so that options may stand between positional arguments; argparse cannot do both.
    parse = parser.parse_args if subparsers else parser.parse_intermixed_args
    options = parse(arguments)
    try:
        command(options)
        sys.stdout.flush()
    except (MostError, ModuleNotFoundError) as error:
        line = _one_line(error, parser.prog)
        if options.debug or line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # Python flushes standard output once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _one_line(error: Exception, command: str) -> str | None:
    """What ``command`` says of an error; None for one that is the program's fault."""
    module = getattr(error, "name", None)
    if is_optional(module):
        error = MissingExtra(module, command)
    return " ".join(str(error).split()) if isinstance(error, MostError) else None


def require_positive(arguments: argparse.Namespace, *names: str) -> None:
    """Raise :class:`ConfigError` for the first of these options that is given and not a finite number above 0."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')}={value}: must be greater than 0")


def _subparsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parsers of the subcommands; argparse shows them only as the choices of an action."""
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [subparser for action in actions for subparser in dict.fromkeys(action.choices.values())]
