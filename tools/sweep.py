#!/usr/bin/env python
"""Run an ablation sweep: one YAML file, many runs, one table and one page.

    python tools/sweep.py --spec examples/sweeps/toy_routing.yaml --dry-run
    python tools/sweep.py --spec examples/sweeps/toy_routing.yaml --executor local
    python tools/sweep.py --spec examples/sweeps/16b_routing.yaml --executor slurm    # again with --resume to collect

Every configuration is checked before the first run starts. Results: results.csv, results.parquet and sweep.html in the
sweep's output folder. docs/ablations.md says what the file holds.
"""

import argparse

from megatron_most import cli
from megatron_most.sweep.plan import describe_runs, plan_runs
from megatron_most.sweep.spec import load_sweep


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", required=True, metavar="FILE", help="YAML file of the sweep")
    parser.add_argument("--executor", choices=("local", "slurm"), default="local", help="default %(default)s")
    parser.add_argument("--resume", action="store_true", help="go on with a sweep that was begun; finished runs stay")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="list the runs and what they cost, and leave")
    instead.add_argument("--collect", action="store_true", help="start nothing; write tables and page of what there is")
    return parser


def sweep(arguments: argparse.Namespace) -> None:
    described = load_sweep(arguments.spec)
    runs = plan_runs(described)
    if arguments.dry_run:
        print(describe_runs(described, runs))
        return
    from megatron_most.sweep import execution, page

    if not arguments.collect:
        execution.start(described, runs, arguments.executor, arguments.resume, lambda line: print(line, flush=True))
    for path in page.write_results(described, runs):
        print(path)


if __name__ == "__main__":
    cli.run(make_parser(), sweep)
