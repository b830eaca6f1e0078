"""Report what this machine can run, and what is missing: its use, and how to get it.

    most doctor
    most doctor --json
    most doctor --check      # one line per package that is missing or of an unsupported version

The exit status is 0 if everything that training on a CPU needs is present and, with --check, every other installed
package works, too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_most import cli
from megatron_most.errors import ConfigError


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser("doctor", __doc__)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--check", action="store_true", help="print only what does not fit, one line each")
    parser.add_argument(
        "--run-dir",
        type=Path,
        default=Path("runs"),
        help="folder whose free disk space is checked (default: %(default)s)",
    )
    return parser


def examine(arguments: argparse.Namespace) -> None:
    try:
        from megatron_most.platform import doctor
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name}: not installed, but required; make setup installs it") from None
    findings = doctor.examine(arguments.run_dir)
    if arguments.check:
        print(doctor.as_check(findings))
        sys.exit(bool(doctor.misfits(findings)))
    print(json.dumps(doctor.as_dict(findings), indent=1) if arguments.json else doctor.as_text(findings))
    if not doctor.can_train(findings):
        sys.exit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    cli.run(make_parser(), examine, arguments)


if __name__ == "__main__":
    main()
