"""Parallel layouts of a configuration that fit a number of GPUs, the promising ones first.

The order comes from a rough time of one step: matrix products at a fixed share of the peak, waiting in the pipeline,
the busiest expert-parallel rank, and messages at the bandwidth of a node or of the network. It ranks layouts against
each other; it predicts no speed.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_most.config import ParallelConfig, RunConfig
from megatron_most.errors import ConfigError
from megatron_most.planning.flops import (
    forward_flops,
    modality_shares,
    recomputed_flops_per_token,
    train_flops_per_token,
)
from megatron_most.planning.gpus import DEFAULT_IMBALANCE, Gpu
from megatron_most.planning.memory import expert_load, memory_per_rank
from megatron_most.planning.shards import shard_sizes

_GIB = 1 << 30
_GPUS_OF_A_NODE = 8
_EFFICIENCY = 0.4
"""Share of the peak that matrix products reach (H100s train models of this kind at 0.3 to 0.4)."""


@dataclass(frozen=True)
class Layout:
    """A layout that was looked at.

    Args:
        memory: bytes on the fullest rank.
        seconds: the rough time of a step that orders layouts.
    """

    parallel: ParallelConfig
    recompute: str
    micro_batches: int
    memory: float
    seconds: float

    def overrides(self, config: RunConfig) -> list[str]:
        """What to give to the training script beside ``config``, nothing where it has this layout already."""
        wanted = {"parallel": dataclasses.asdict(self.parallel), "training": {"recompute": self.recompute}}
        return [
            f"{section}.{name}={'null' if value is None else value}"
            for section, values in wanted.items()
            for name, value in values.items()
            if getattr(getattr(config, section), name) != value
        ]


def fitting_layouts(config: RunConfig, world_size: int, gpu: Gpu, imbalance: float = DEFAULT_IMBALANCE) -> list[Layout]:
    """Layouts of ``config`` on ``world_size`` GPUs whose fullest rank fits ``gpu``, the fastest by estimate first.

    Everything but ``parallel`` and ``training.recompute`` stays as configured, so all of them train the same model on
    the same rows. Of layouts that differ in recomputation alone, the fastest that fits is kept.

    Raises:
        ConfigError: nothing fits; it names the layout that needs least.
    """
    layouts = [describe_layout(candidate, world_size, gpu, imbalance) for candidate in _candidates(config, world_size)]
    if not layouts:
        raise ConfigError(
            f"--gpus={world_size}: no layout suits the model and training.global_batch_size="
            f"{config.training.global_batch_size}"
        )
    fitting = [layout for layout in layouts if layout.memory <= gpu.usable]
    if not fitting:
        least = min(layouts, key=lambda layout: layout.memory)
        raise ConfigError(
            f"--gpus={world_size}: nothing fits {gpu.usable / _GIB:.1f} GiB; {least.memory / _GIB:.1f} GiB are the"
            f" least that is needed, by {' '.join(least.overrides(config)) or 'the layout of the configuration'}"
        )
    fitting.sort(key=lambda layout: layout.seconds)
    seen: set[str] = set()
    return [layout for layout in fitting if not (str(layout.parallel) in seen or seen.add(str(layout.parallel)))]


def describe_layout(config: RunConfig, world_size: int, gpu: Gpu, imbalance: float = DEFAULT_IMBALANCE) -> Layout:
    """Memory and rough time of the layout that ``config`` has."""
    memory = max(estimate.total for estimate in memory_per_rank(config, world_size, imbalance).values())
    micro_batches = config.num_microbatches(config.parallel.data_parallel_size(world_size))
    seconds = _step_seconds(config, world_size, gpu, imbalance, micro_batches)
    return Layout(config.parallel, config.training.recompute, micro_batches, memory, seconds)


def _candidates(config: RunConfig, world_size: int) -> Iterator[RunConfig]:
    """Every combination of sizes that the rules of the configuration accept."""
    divisors = [size for size in range(1, world_size + 1) if world_size % size == 0]
    small = [size for size in divisors if size <= _GPUS_OF_A_NODE]
    pipelines = [size for size in divisors if config.model.num_layers % size == 0]
    experts = [size for size in divisors if config.model.moe.num_experts % size == 0]
    for tensor, pipeline, context, expert in itertools.product(small, pipelines, small, experts):
        for expert_tensor in (None, 1) if tensor > 1 else (None,):  # null: as tensor
            for virtual in (None, 2, 3, 4) if pipeline > 1 else (None,):
                for recompute in ("none", "moe", "full"):
                    try:
                        candidate = dataclasses.replace(
                            config,
                            parallel=ParallelConfig(tensor, pipeline, virtual, context, expert, expert_tensor),
                            training=dataclasses.replace(config.training, recompute=recompute),
                        )
                        candidate.num_microbatches(candidate.parallel.data_parallel_size(world_size))
                    except ConfigError:
                        continue
                    yield candidate


def _step_seconds(config: RunConfig, world_size: int, gpu: Gpu, imbalance: float, micro_batches: int) -> float:
    return _compute_seconds(config, world_size, gpu, imbalance, micro_batches) + _message_seconds(
        config, world_size, gpu, imbalance
    )


def _compute_seconds(config: RunConfig, world_size: int, gpu: Gpu, imbalance: float, micro_batches: int) -> float:
    """Matrix products of the slowest rank, and its waiting for the first and last micro-batch of the pipeline."""
    parallel, shares = config.parallel, modality_shares(config)
    pipeline, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    flops = {name: forward_flops(config, name) for name in shares}
    experts, heads = (
        3 * sum(share * flops[name][part] for name, share in shares.items()) for part in ("experts", "heads")
    )
    uneven = imbalance if parallel.expert_model_parallel_size > 1 else 1
    per_token = train_flops_per_token(config) + recomputed_flops_per_token(config)
    per_token += experts * (max(expert_load(config)) * uneven - 1)
    per_token += heads * (pipeline - 1)  # the last stage alone has them, and the others wait for it
    bubble = (pipeline - 1) / (micro_batches * virtual)
    return _tokens(config, world_size) * per_token / (gpu.peak * _EFFICIENCY) * (1 + bubble)


def _message_seconds(config: RunConfig, world_size: int, gpu: Gpu, imbalance: float) -> float:
    """What a rank sends in a step, at the bandwidth of the slowest link of each group."""
    parallel, moe, shares = config.parallel, config.model.moe, modality_shares(config)
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    pipeline, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    tokens, width = _tokens(config, world_size), {"bf16": 2, "fp32": 4}[config.precision.dtype]
    row = config.model.hidden_size * width
    passes = {"none": 2, "moe": 3, "full": 3}[config.training.recompute]  # forward, backward, forward again
    layers, moe_layers = config.model.num_layers, config.model.num_layers - config.model.first_k_dense_replace

    def seconds(num_bytes: float, ranks: int, stride: int = 1) -> float:
        """Each of ``ranks`` ranks, ``stride`` apart, keeps its own share of ``num_bytes`` and sends the others."""
        inside = ranks * stride <= _GPUS_OF_A_NODE
        return num_bytes * (ranks - 1) / ranks / (gpu.node_bandwidth if inside else gpu.network_bandwidth)

    # A rank has tokens of its own share of the work; its tensor group gathers and scatters those of all its ranks
    # around attention and around an MLP.
    total = seconds(passes * layers * 4 * tokens * tensor * row, tensor)
    total += seconds(passes * layers * 2 * tokens * context * row, context, stride=tensor)
    pairs = (
        tokens
        * parallel.expert_tensor_size
        * sum(shares[group.modality] * group.moe_router_topk for group in moe.groups)
    )
    expert_ranks = parallel.expert_model_parallel_size * parallel.expert_tensor_size
    total += seconds(passes * moe_layers * 2 * pairs * row * max(expert_load(config)) * imbalance, expert_ranks)
    total += seconds(2 * tokens * pipeline * virtual * row, pipeline, stride=world_size // pipeline)
    # Gradients are reduced in fp32 and weights gathered once a step; half of it is taken to hide behind the backward.
    weights = sum(shard_sizes(config, 0, 0).values()) * (4 + width)
    return total + 0.5 * seconds(weights, world_size // (tensor * pipeline), stride=tensor)


def _tokens(config: RunConfig, world_size: int) -> float:
    """Positions of a step for each rank, the work of a replica's ranks shared out evenly."""
    return config.training.global_batch_size * config.data.seq_length / world_size
