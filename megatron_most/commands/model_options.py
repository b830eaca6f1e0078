"""Options that the commands share which load a model to generate or to be evaluated."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_most.config import ParallelConfig
    from megatron_most.inference import Decoding

AUDIO = ("nemo", "soundfile", "soxr")
"""Modules of the extra ``audio`` that hearing and speaking need."""

SIZES = ("tensor_parallel", "expert_parallel")
"""Names of the options that must be positive."""


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="checkpoint directory, run directory (its newest checkpoint), or folder of a Hugging Face export",
    )


def add_parts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", help="text tokenizer, if it has moved since training")
    parser.add_argument("--codec", help="codec, if it has moved since training")


def add_decoding(
    parser: argparse.ArgumentParser, max_new_tokens: int | None = None, max_seconds: float | None = None
) -> None:
    """Options of sampling and of an answer's length, whose maximums are by default what the model's context leaves."""
    context = "what the model's context leaves"
    parser.add_argument("--temperature", type=float, default=0.0, help="sampling temperature; 0 (default) is greedy")
    parser.add_argument(
        "--top-k", type=int, default=0, help="sample from the k most probable ids; 0 (default): from all"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the most probable ids that sum to p (default %(default)g)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling (default %(default)s)")
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="make text ids that the prompt or the answer has less probable, by 1.1 for example (default 1: off)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=max_new_tokens,
        help=f"maximum length of a text in ids (default: {max_new_tokens or context})",
    )
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=max_seconds,
        help=f"maximum length of speech in seconds (default: {max_seconds or context})",
    )


def decoding_of(arguments: argparse.Namespace) -> Decoding:
    """What the options of :func:`add_decoding` say.

    Raises:
        ConfigError: one of them is out of range.
    """
    from megatron_most.inference import Decoding, Sampling

    sampling = Sampling(
        arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed, arguments.repetition_penalty
    )
    return Decoding(arguments.max_new_tokens, arguments.max_seconds, sampling)


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
