"""Run an ablation sweep: one YAML file -> many runs -> one table and one page.

    most sweep --spec examples/sweeps/toy_routing.yaml --dry-run
    most sweep --spec examples/sweeps/toy_routing.yaml --executor local
    most sweep --spec examples/sweeps/16b_routing.yaml --executor slurm    # again with --resume to collect

Every configuration is checked before the first run starts. Ctrl-C lets the running jobs save and stop; a sweep that is
killed leaves them running. Results: results.csv, results.parquet and sweep.html in the sweep's output folder.
docs/ablations.md describes the file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_most import cli
from megatron_most.commands import evaluate
from megatron_most.commands.launch import LAUNCHERS
from megatron_most.extras import require


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser("sweep", __doc__)
    parser.add_argument("--spec", required=True, metavar="FILE", help="YAML file of the sweep")
    parser.add_argument(
        "--executor", choices=("local", "slurm"), default="local", help="where the runs start (default %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="continue a sweep; finished runs are kept")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="list the runs and their cost, and exit")
    instead.add_argument(
        "--collect", action="store_true", help="start no runs; write tables and page from the results so far"
    )
    return parser


def sweep(arguments: argparse.Namespace) -> None:
    if not arguments.dry_run:
        require("jinja2", "jiwer", "pyarrow", "scipy", "submitit")
    from megatron_most.sweep.plan import describe_runs, plan_runs
    from megatron_most.sweep.spec import load_sweep

    described = load_sweep(arguments.spec)
    runs = plan_runs(described)
    if arguments.dry_run:
        print(describe_runs(described, runs))
        return
    from megatron_most.sweep import execution, job, page

    if not arguments.collect:
        programs = job.Programs(
            train=[str(LAUNCHERS / "single_node.sh")],
            train_node=[str(LAUNCHERS / "multi_node.sh")],
            evaluate=[sys.executable, "-m", evaluate.__name__],
        )
        execution.start(
            described, runs, arguments.executor, arguments.resume, programs, lambda line: print(line, flush=True)
        )
    for path in page.write_results(described, runs):
        print(path)


def main(arguments: Sequence[str] | None = None) -> None:
    cli.run(make_parser(), sweep, arguments)


if __name__ == "__main__":
    main()
