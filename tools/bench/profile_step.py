#!/usr/bin/env python
"""Time of a training step by operator: matrix products, attention and the rest.

    python -m tools.bench.profile_step --config examples/configs/quickstart.yaml parallel.expert_model_parallel_size=1

Uses the data and model of a configuration and does not write to its run directory. Times are self times of torch's
operators in this process; under torchrun, those of rank 0.
"""

from __future__ import annotations

import argparse

from torch.profiler import ProfilerActivity, profile

from megatron_most import cli, parallel, platform
from megatron_most.config import load_config
from megatron_most.data.loading.loader import train_batches
from megatron_most.training.microbatches import stage
from megatron_most.training.train_step import build_train_state, train_step

MATRIX_PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::_grouped_mm")
ATTENTION = ("aten::_scaled_dot_product", "aten::_flash_attention", "aten::_efficient_attention")
WARM_UP_STEPS, STEPS = 5, 10


def profile_step(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    platform.install()
    threads = platform.set_threads(config.training.threads_per_rank)
    parallel.initialize(config.parallel, config.seed)
    state = build_train_state(config)
    dp_rank, dp_size = parallel.data_parallel_place()
    batches = train_batches(config, dp_rank=dp_rank, dp_size=dp_size, consumed_samples=0)

    def step() -> None:
        train_step(state, [stage(next(batches), platform.device()) for _ in range(config.num_microbatches(dp_size))])

    for _ in range(WARM_UP_STEPS):
        step()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            step()
    if parallel.is_rank_zero():
        report(profiler, threads)
    parallel.destroy()


def report(profiler: profile, threads: int) -> None:
    """Print shares of self time and the operators that take most."""
    times: dict[str, float] = {}
    for event in profiler.key_averages():
        # Host time on a CPU, kernel time on a GPU.
        microseconds = event.self_device_time_total or event.self_cpu_time_total
        times[event.key] = times.get(event.key, 0) + microseconds
    total = sum(times.values())
    products = sum(time for key, time in times.items() if key in MATRIX_PRODUCTS)
    attention = sum(time for key, time in times.items() if key.startswith(ATTENTION))
    print(f"operator time per step: {total / STEPS / 1e3:.1f} ms with {threads} thread(s)")
    print(f"matrix products {products / total:.1%}, attention kernels {attention / total:.1%}")
    for key, time in sorted(times.items(), key=lambda item: -item[1])[:15]:
        print(f"  {time / total:6.1%}  {time / STEPS / 1e3:8.2f} ms  {key}")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="profile a training step")
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser


if __name__ == "__main__":
    cli.run(make_parser(), profile_step)
