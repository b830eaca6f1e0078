"""Pretrain a MoST model.

    most train --config FILE.yaml [key=value ...]
    most torchrun --nproc-per-node 8 -m megatron_most.commands.train --config FILE.yaml [key=value ...]
    most train --config FILE.yaml --dry-run --world-size 64 --no-check-files
    most train --replay RUN_DIR/failed_batches/step_00000100.json [key=value ...]

Start it again with the same run_dir to continue from the newest checkpoint. Exit status: 0 when training is complete,
75 when it was asked to stop and has saved, 1 on an error. Ranks of torchrun end with 0 instead of 75, so that it does
not start them again; the scripts of `most launch` end with 75.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_most import cli
from megatron_most.errors import ConfigError, MostError

if TYPE_CHECKING:
    from megatron_most.config import RunConfig

STOPPED_FILE = "MOST_STOPPED_FILE"
"""Environment variable with the name of a file that ranks create when they leave stopped and saved."""


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser("train", __doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", metavar="FILE", help="YAML file of the run configuration")
    source.add_argument(
        "--replay",
        metavar="FILE",
        help="run one batch alone, as recorded in a run's failed_batches/, and print its losses; nothing is trained",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="overrides of the configuration, such as training.train_iters=100",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check the configuration, print sizes and estimates, and exit"
    )
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="with --dry-run: number of ranks to assume (default: WORLD_SIZE, or the fewest that fit)",
    )
    parser.add_argument(
        "--no-check-files",
        action="store_true",
        help="--dry-run without the datasets, the tokenizer and the checkpoint to start from",
    )
    return parser


def train(arguments: argparse.Namespace) -> None:
    cli.require_positive(arguments, "world_size")
    if arguments.dry_run and arguments.replay is not None:
        raise ConfigError(f"--replay={arguments.replay}: cannot be combined with --dry-run")
    if arguments.dry_run:
        if _rank() == 0:
            describe(arguments)
        return
    if arguments.world_size is not None:
        raise ConfigError(f"--world-size={arguments.world_size}: needs --dry-run; torchrun starts the ranks of a run")
    if arguments.replay is not None:
        from megatron_most.training.replay import read_failed_batch, replay

        batch = _by_all_ranks(lambda: read_failed_batch(arguments.replay, arguments.overrides))
        _by_all_ranks(lambda: _require_ranks(batch.config, _world_size()))
        replay(batch)
        return
    config = read_config(arguments)
    if _rank() == 0:
        print("loading torch and Megatron-Core", flush=True)
    # After the checks: this takes seconds.
    from megatron_most.training import Trainer

    record = os.environ.get(STOPPED_FILE)
    if record is not None:
        Path(record).unlink(missing_ok=True)  # of ranks that torchrun has started again
    if not Trainer(config).run():
        _leave_stopped(record)


def _leave_stopped(record: str | None) -> None:
    """End training that has saved before its last step, so that whoever started it knows."""
    if record is not None:
        Path(record).touch()
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        sys.exit(cli.STOPPED)


def describe(arguments: argparse.Namespace) -> None:
    from megatron_most.config import load_config
    from megatron_most.planning import check_files, describe_run, smallest_world_size

    config = load_config(arguments.config, arguments.overrides)
    if not arguments.no_check_files:
        check_files(config)
    started = cli.launcher_integer("WORLD_SIZE", smallest_world_size(config.parallel), least=1)
    print(describe_run(config, arguments.world_size or started))


def read_config(arguments: argparse.Namespace) -> RunConfig:
    """Load the configuration and check that it fits the number of ranks."""
    from megatron_most.config import load_config

    config = _by_all_ranks(lambda: load_config(arguments.config, arguments.overrides))
    _by_all_ranks(lambda: _require_ranks(config, _world_size()))
    return config


def check_config(arguments: argparse.Namespace, world_size: int | None) -> None:
    """What :func:`read_config` checks, before there are ranks; their number only if it is known."""
    if arguments.replay is None and not arguments.dry_run:
        from megatron_most.config import load_config

        config = load_config(arguments.config, arguments.overrides)
        if world_size is not None:
            _require_ranks(config, world_size)


def _require_ranks(config: RunConfig, world_size: int) -> None:
    config.num_microbatches(config.parallel.data_parallel_size(world_size))


def _by_all_ranks[T](check: Callable[[], T]) -> T:
    """Do ``check``, in which all ranks find the same error; rank 0 reports it."""
    try:
        return check()
    except MostError:
        # The others wait: torchrun kills all ranks once one exits.
        if _rank() != 0:
            time.sleep(3)
            sys.exit(1)
        raise


def _world_size() -> int:
    return cli.launcher_integer("WORLD_SIZE", 1, least=1)


def _rank() -> int:
    return cli.launcher_integer("RANK", 0)


def main(arguments: Sequence[str] | None = None) -> None:
    cli.run(make_parser(), train, arguments)


if __name__ == "__main__":
    main()
