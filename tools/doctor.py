"""Say what this machine can run, what is missing, what each missing part would give and how to get it.

    python tools/doctor.py
    python tools/doctor.py --json
    python tools/doctor.py --check      one line for each thing that does not fit what is supported

Exit status 0 when everything is there that training on a CPU needs; with --check, when nothing is there that does not
fit either.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the first thing to run in a clone, before anything is installed

from megatron_most.cli import run  # noqa: E402
from megatron_most.errors import ConfigError  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print the findings as JSON")
    output.add_argument("--check", action="store_true", help="print what does not fit, one line each")
    parser.add_argument("--run-dir", type=Path, default=Path("runs"), help="where space is measured (default: runs)")
    run(parser, examine)


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


if __name__ == "__main__":
    main()
