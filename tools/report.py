"""Write the report of a run: one HTML page that needs nothing else.

python tools/report.py runs/quickstart
python tools/report.py runs/quickstart --output quickstart.html
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_most.cli import run
from megatron_most.report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="the run directory")
    parser.add_argument("--output", type=Path, help="the HTML file to write (default: RUN_DIR/report.html)")
    run(parser, lambda arguments: print(write_report(arguments.run_dir, arguments.output)))


if __name__ == "__main__":
    main()
