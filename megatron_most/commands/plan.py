"""List parallel layouts of a configuration that fit a number of GPUs, the fastest by estimate first.

    most plan --config examples/configs/most_16b_stage1.yaml --gpus 64 --no-check-files

For the first layout it also gives the time of a step by parts, the days of the run, and the disk space and host memory
of its checkpoints. docs/launch.md explains the estimates. Nothing is allocated; no GPU is needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_most import cli
from megatron_most.planning import DEFAULT_IMBALANCE, GPUS


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser("plan", __doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of the run configuration")
    parser.add_argument("--gpus", required=True, type=int, metavar="N", help="number of GPUs")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100", help="type of GPU (default %(default)s)")
    parser.add_argument(
        "--imbalance",
        type=float,
        default=DEFAULT_IMBALANCE,
        help="assumed load of the busiest expert-parallel rank over the mean; the mix of modalities comes on top"
        " (default %(default)s)",
    )
    parser.add_argument("--tflops", type=float, metavar="X", help="also give the days at X TFLOP/s for each GPU")
    parser.add_argument(
        "--no-check-files",
        action="store_true",
        help="plan without the datasets, the tokenizer and the checkpoint to start from",
    )
    parser.add_argument("--limit", type=int, default=10, help="number of layouts to list (default %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the configuration")
    return parser


def plan(arguments: argparse.Namespace) -> None:
    cli.require_positive(arguments, "gpus", "imbalance", "limit", "tflops")
    from megatron_most.config import load_config
    from megatron_most.planning import check_files, describe_layouts

    config = load_config(arguments.config, arguments.overrides)
    if not arguments.no_check_files:
        check_files(config)
    print(
        describe_layouts(config, arguments.gpus, arguments.gpu, arguments.imbalance, arguments.limit, arguments.tflops)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    cli.run(make_parser(), plan, arguments)


if __name__ == "__main__":
    main()
