#!/usr/bin/env python
"""The cost of a generated token: milliseconds, operators and host waits, by batch size.

    python -m tools.bench.decode [--batches N ...] [--positions N ...] [--layers N] [--tokens N] [--calls N]
                                 [--arms NAME ...] [--config FILE] [key=value ...]

Generates text and speech after a prompt, with random weights. On a GPU the model is the first layers of a recipe
at full width, with and without a CUDA graph; on a CPU it is the tiny model of tools/bench/launches.py. A token's cost
comes from the difference between a long and a short generation, so prompts do not count. Prints Markdown.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import torch

from megatron_most import cli, parallel, platform
from megatron_most.config import RunConfig, load_config
from megatron_most.config.load import build_config
from megatron_most.inference import Generator, Sampling
from megatron_most.model import MoSTModel, build_model
from megatron_most.training.run_directory import device_name
from tools.bench import launches
from tools.bench.gpu_layer import ONE_GPU, RECIPE
from tools.bench.timing import Timing

ARMS: dict[str, dict[str, bool]] = {"as it comes": {}, "without a graph": {"cuda_graph": False}}
PORTABLE = (
    "model.transformer_impl=portable",
    "model.moe.moe_token_dispatcher_type=alltoall",
    "model.moe.expert_backend=grouped",
)
SHORT = 8
Speak = Callable[[int], list[list[int]]]
"""Number of tokens -> the generated tokens of every row, flat."""


class Endless(Sampling):
    """Takes the last allowed id, which is a frame and never the end of audio; codes are greedy."""

    def choose(self, logits: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        if logits.dim() == 2:
            logits = logits + torch.arange(0, logits.shape[-1], device=logits.device) * 1000.0
        return super().choose(logits, noise)


def bench_decode(arguments: argparse.Namespace) -> None:
    cli.require_positive(arguments, "layers", "calls", "tokens")
    overrides = [f"model.num_layers={arguments.layers}", *arguments.overrides]
    if arguments.config or platform.device().type == "cuda":
        config = load_config(arguments.config or RECIPE, [*ONE_GPU, *PORTABLE, *overrides])
    else:
        config = build_config("bench", launches.CONFIG, overrides)
    prompts = [(batch, position) for batch in arguments.batches for position in arguments.positions]
    print(measure(config, arguments.arms, prompts, arguments.tokens, arguments.calls))


def measure(config: RunConfig, arms: Sequence[str], prompts: Sequence[tuple[int, int]], tokens: int, calls: int) -> str:
    """Measure on this process's device.

    Args:
        arms: of :data:`ARMS`.
        prompts: their number and length.
        tokens: difference between the long and the short generation.
        calls: timed pairs of generations for each number.

    Returns:
        The report, in Markdown.
    """
    platform.install()
    parallel.initialize(config.parallel, config.seed)
    [model] = build_model(config)
    lines = [
        f"{device_name(platform.device())}, torch {torch.__version__}, {config.model.num_layers} layers,"
        f" hidden size {config.model.hidden_size}, {config.precision.dtype}.",
        "",
        "| what | batch | after position | step | per token | tokens/s | operators | waits | ids of the first arm |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for batch, position in prompts:
        for what in ("text", "speech"):
            first: list[list[int]] | None = None
            for arm in arms:
                speak = speaker(model, what, (batch, position), ARMS[arm])
                found = speak(SHORT + tokens)
                first = first or found
                count, timing = count_token(speak), time_token(speak, tokens, calls)
                same = "yes" if found == first else "no"
                lines.append(
                    f"| {what} | {batch} | {position} | {arm} | {timing} | {batch / timing.median:.0f}"
                    f" | {count.num_operators} | {count.num_waits} | {same} |"
                )
    parallel.destroy()
    return "\n".join(lines)


def speaker(model: MoSTModel, what: str, shape: tuple[int, int], options: dict[str, bool]) -> Speak:
    """A generator of ``text`` or ``speech`` for prompts of ``shape``: number and length."""
    generator, vocab = Generator(model, **options), model.vocab
    random = np.random.default_rng(0)
    ids = random.integers(0, vocab.text_vocab_size, shape)
    ids[:, -1] = vocab.begin_of_audio if what == "speech" else ids[:, -1]
    prompts = [SimpleNamespace(ids=row, side_codes=None) for row in ids]
    if what == "text":
        return lambda number: generator.text(prompts, end=-1, max_new=number, sampling=Sampling())

    def speech(number: int) -> list[list[int]]:
        rows = generator.speech(prompts, number, Endless())
        assert all(len(row) == number for row in rows)
        return [row.ravel().tolist() for row in rows]

    return speech


def count_token(speak: Speak) -> launches.Count:
    """Counts for one more token, without the occasional test whether all rows have ended."""
    counts = []
    for number in (SHORT, SHORT + 1):
        with launches.Counting() as count:
            speak(number)
        counts.append(count)
    return counts[1] - counts[0]


def time_token(speak: Speak, tokens: int, calls: int) -> Timing:
    def seconds(number: int) -> float:
        began = time.perf_counter()
        speak(number)  # returns when the results are on the host
        return time.perf_counter() - began

    return Timing.of([(seconds(SHORT + tokens) - seconds(SHORT)) / tokens for _ in range(calls)])


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="time and count the tokens of a generation")
    parser.add_argument("--config", metavar="FILE", help=f"recipe (default {RECIPE} on a GPU)")
    parser.add_argument("--layers", type=int, default=3, metavar="N", help="the first has no experts (default 3)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], metavar="N", help="prompts (default 1 16)")
    parser.add_argument("--positions", type=int, nargs="+", default=[8], metavar="N", help="of a prompt (default 8)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="tokens of a timed generation (default 64)")
    parser.add_argument("--calls", type=int, default=5, metavar="N", help="timed generations (default %(default)s)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS], metavar="NAME", help=", ".join(ARMS))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides of the configuration")
    return parser


if __name__ == "__main__":
    cli.run(make_parser(), bench_decode)
