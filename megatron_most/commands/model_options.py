"""Options that the commands share which load a model to generate or to be evaluated."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_most.config import ParallelConfig

SIZES = ("tensor_parallel", "expert_parallel")
"""Names of the options that must be positive."""


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="checkpoint directory, run directory (its newest checkpoint), or folder of a Hugging Face export",
    )


def add_sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tensor-parallel", type=int, default=1, help="under torchrun: ranks that share every layer (default 1)"
    )
    parser.add_argument(
        "--expert-parallel", type=int, default=1, help="under torchrun: ranks that share the experts (default 1)"
    )


def layout_of(arguments: argparse.Namespace) -> ParallelConfig:
    from megatron_most.config import ParallelConfig

    return ParallelConfig(
        tensor_model_parallel_size=arguments.tensor_parallel, expert_model_parallel_size=arguments.expert_parallel
    )
