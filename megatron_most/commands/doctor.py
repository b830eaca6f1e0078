"""Say what this machine can run, what is missing, what each missing part would give and how to get it.

    most doctor
    most doctor --json
    most doctor --check      one line for each thing that does not fit what is supported

Exit status 0 when everything is there that training on a CPU needs; with --check, when nothing is there that does not
fit either.
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
    output.add_argument("--json", action="store_true", help="print the findings as JSON")
    output.add_argument("--check", action="store_true", help="print what does not fit, one line each")
    parser.add_argument("--run-dir", type=Path, default=Path("runs"), help="where space is measured (default: runs)")
    return parser


def examine(arguments: argparse.Namespace) -> None:
    try:
        from megatron_most.platform import doctor
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name}: not installed, and nothing runs without it; make setup installs it") from None
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
