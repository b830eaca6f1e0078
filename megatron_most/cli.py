"""What every command shares: one-line errors, ``--debug`` for the traceback, exit status 0 only on success."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from megatron_most.errors import MostError


def run(parser: argparse.ArgumentParser, command: Callable[[argparse.Namespace], None]) -> None:
    """Parse ``sys.argv`` with ``parser``, call ``command`` and leave the process with its status.

    A :class:`MostError` becomes one line on stderr and exit status 1; ``--debug`` lets it propagate instead.
    Ctrl-C exits with 130, as shells expect.
    """
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()
    try:
        command(arguments)
    except MostError as error:
        if arguments.debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
