"""Pretrain a MoST model.

    torchrun --nproc-per-node 8 examples/pretrain_most.py --config examples/configs/NAME.yaml [key=value ...]

Run it again with the same run_dir to continue from the newest checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from megatron_most import cli
from megatron_most.config import RunConfig, load_config
from megatron_most.errors import MostError

RANK = int(os.environ.get("RANK", "0"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain a MoST model; start it under torchrun for several ranks.")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML configuration")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. training.steps=100")
    parser.add_argument("--dry-run", action="store_true", help="print what would be trained and leave")
    parser.add_argument("--world-size", type=int, metavar="N", help="ranks that --dry-run assumes")
    cli.run(parser, pretrain)


def pretrain(arguments: argparse.Namespace) -> None:
    if arguments.dry_run:
        if RANK == 0:
            describe(arguments)
        return
    config = read_config(arguments)
    # After the checks: Megatron takes seconds to import.
    from megatron_most.training import Trainer

    Trainer(config).run()


def describe(arguments: argparse.Namespace) -> None:
    from megatron_most.planning import describe_run, smallest_world_size

    config = load_config(arguments.config, arguments.overrides)
    started = os.environ.get("WORLD_SIZE")
    print(describe_run(config, arguments.world_size or int(started or smallest_world_size(config.parallel))))


def read_config(arguments: argparse.Namespace) -> RunConfig:
    """Load the configuration and check it against the ranks that were started."""
    try:
        config = load_config(arguments.config, arguments.overrides)
        config.num_microbatches(config.parallel.data_parallel_size(int(os.environ.get("WORLD_SIZE", "1"))))
        return config
    except MostError:
        # Every rank finds the same mistake and rank 0 tells it; torchrun ends all ranks as soon as one is gone.
        if RANK != 0:
            time.sleep(3)
            sys.exit(1)
        raise


if __name__ == "__main__":
    main()
