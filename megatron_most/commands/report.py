"""Write the report of a run as one self-contained HTML page.

most report runs/quickstart
most report runs/quickstart --output quickstart.html
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_most import cli
from megatron_most.extras import require


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser("report", __doc__)
    parser.add_argument("run_dir", type=Path, help="run directory")
    parser.add_argument("--output", type=Path, help="HTML file to write (default: RUN_DIR/report.html)")
    return parser


def report(arguments: argparse.Namespace) -> None:
    require("jinja2", "jiwer")
    from megatron_most.report import write_report

    print(write_report(arguments.run_dir, arguments.output))


def main(arguments: Sequence[str] | None = None) -> None:
    cli.run(make_parser(), report, arguments)


if __name__ == "__main__":
    main()
