"""Parallel layouts of a configuration that fit a number of GPUs, the fastest by estimate first."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_most.config import ParallelConfig, RunConfig
from megatron_most.errors import ConfigError
from megatron_most.planning.gpus import DEFAULT_IMBALANCE, GPUS_PER_NODE, Gpu
from megatron_most.planning.memory import memory_per_rank
from megatron_most.planning.rows import RowContents, row_contents
from megatron_most.planning.step_time import RECOMPUTED, step_seconds

_GIB = 1 << 30


@dataclass(frozen=True)
class Layout:
    """A layout and what it is expected to take.

    Args:
        memory: bytes on the fullest rank.
        seconds: of a step.
    """

    parallel: ParallelConfig
    recompute: str
    micro_batches: int
    memory: float
    seconds: float

    def overrides(self, config: RunConfig) -> list[str]:
        """The overrides that give ``config`` this layout; none if it has it."""
        wanted: dict[str, dict[str, Any]] = {"parallel": self.parallel.sizes, "training": {"recompute": self.recompute}}
        return [
            f"{section}.{name}={'null' if value is None else value}"
            for section, values in wanted.items()
            for name, value in values.items()
            if getattr(getattr(config, section), name) != value
        ]


def fitting_layouts(config: RunConfig, world_size: int, gpu: Gpu, imbalance: float = DEFAULT_IMBALANCE) -> list[Layout]:
    """Layouts of ``config`` on ``world_size`` GPUs whose fullest rank fits ``gpu``, by time, then memory.

    Everything but ``parallel`` and ``training.recompute`` stays as configured, so all of them train the same model on
    the same rows. Of layouts that differ in recomputation alone, the first is kept.

    Raises:
        ConfigError: nothing fits; it names the layout that needs least.
    """
    rows = row_contents(config)
    layouts = [
        describe_layout(candidate, world_size, gpu, imbalance, rows) for candidate in _candidates(config, world_size)
    ]
    if not layouts:
        raise ConfigError(
            f"--gpus={world_size}: no layout suits the model and training.global_batch_size="
            f"{config.training.global_batch_size}"
        )
    fitting = [layout for layout in layouts if layout.memory <= gpu.usable]
    if not fitting:
        least = min(layouts, key=lambda layout: layout.memory)
        raise ConfigError(
            f"--gpus={world_size}: nothing fits {gpu.usable / _GIB:.1f} GiB; the least is {least.memory / _GIB:.1f}"
            f" GiB, with {' '.join(least.overrides(config)) or 'the layout of the configuration'}"
        )
    fitting.sort(key=lambda layout: (layout.seconds, layout.memory))
    first: dict[str, Layout] = {}
    for layout in fitting:
        first.setdefault(str(layout.parallel), layout)
    return list(first.values())


def describe_layout(config: RunConfig, world_size: int, gpu: Gpu, imbalance: float, rows: RowContents) -> Layout:
    """The layout that ``config`` has."""
    memory = max(estimate.total for estimate in memory_per_rank(config, world_size, imbalance, rows).values())
    micro_batches = config.num_microbatches(config.parallel.data_parallel_size(world_size))
    seconds = sum(step_seconds(config, world_size, gpu, imbalance, rows).values())
    return Layout(config.parallel, config.training.recompute, micro_batches, memory, seconds)


def _candidates(config: RunConfig, world_size: int) -> Iterator[RunConfig]:
    """Every combination that the rules of the configuration accept."""
    divisors = [size for size in range(1, world_size + 1) if world_size % size == 0]
    small = [size for size in divisors if size <= GPUS_PER_NODE]
    pipelines = [size for size in divisors if config.model.num_layers % size == 0]
    experts = [size for size in divisors if config.model.moe.num_experts % size == 0]
    for tensor, pipeline, context, expert in itertools.product(small, pipelines, small, experts):
        for expert_tensor in (None, 1) if tensor > 1 else (None,):  # null: as tensor
            for virtual in (None, 2, 3, 4) if pipeline > 1 else (None,):
                for recompute in RECOMPUTED:
                    try:
                        candidate = dataclasses.replace(
                            config,
                            parallel=dataclasses.replace(
                                config.parallel,
                                tensor_model_parallel_size=tensor,
                                pipeline_model_parallel_size=pipeline,
                                virtual_pipeline_model_parallel_size=virtual,
                                context_parallel_size=context,
                                expert_model_parallel_size=expert,
                                expert_tensor_parallel_size=expert_tensor,
                            ),
                            training=dataclasses.replace(config.training, recompute=recompute),
                        )
                        candidate.num_microbatches(candidate.parallel.data_parallel_size(world_size))
                    except ConfigError:
                        continue
                    yield candidate
