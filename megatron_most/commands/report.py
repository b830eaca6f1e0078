"""Write the report of a run, or compare several runs, as one self-contained HTML page.

most report runs/quickstart
most report runs/quickstart --output quickstart.html
most report runs/seed1 runs/seed2 --output seeds.html
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_most import cli
from megatron_most.extras import require


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser("report", __doc__)
    parser.add_argument("run_dir", type=Path, nargs="+", help="run directory; several are compared")
    parser.add_argument(
        "--output",
        type=Path,
        help="HTML file to write (default: RUN_DIR/report.html, or ./comparison.html for several runs)",
    )
    return parser


def report(arguments: argparse.Namespace) -> None:
    require("jinja2", "jiwer")
    from megatron_most.report import write_comparison, write_report

    if len(arguments.run_dir) == 1:
        print(write_report(arguments.run_dir[0], arguments.output))
    else:
        print(write_comparison(arguments.run_dir, arguments.output or Path("comparison.html")))


def main(arguments: Sequence[str] | None = None) -> None:
    cli.run(make_parser(), report, arguments)


if __name__ == "__main__":
    main()
