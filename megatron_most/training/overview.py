"""What a configuration would train: layout, parameters, batches and memory, worked out without allocating anything."""

from __future__ import annotations

import itertools
import math

from megatron_most.config import MoEConfig, ParallelConfig, RunConfig, dump_config
from megatron_most.model import check_libraries, count_parameters
from megatron_most.moe import ExpertGroups

_GIB = 1 << 30


def smallest_world_size(parallel: ParallelConfig) -> int:
    """The fewest ranks on which both the dense part and the experts fit their layout."""
    experts = parallel.expert_tensor_size * parallel.expert_model_parallel_size * parallel.pipeline_model_parallel_size
    return math.lcm(parallel.model_parallel_size, experts)


def describe_run(config: RunConfig, world_size: int) -> str:
    """The resolved configuration and what follows from it on ``world_size`` ranks, as text for people.

    Raises:
        ConfigError: the layout does not fit ``world_size``, the batch does not fit the layout, or a library that the
            model needs is missing.
    """
    check_libraries(config)
    parallel, training = config.parallel, config.training
    data_parallel = parallel.data_parallel_size(world_size)
    microbatches = config.num_microbatches(data_parallel)
    counts = count_parameters(config)
    memory = memory_per_rank(config, world_size)
    layout = {
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "virtual stages": parallel.virtual_pipeline_model_parallel_size or 1,
        "context": parallel.context_parallel_size,
        "expert": parallel.expert_model_parallel_size,
        "expert tensor": parallel.expert_tensor_size,
        "data": data_parallel,
    }
    positions = training.global_batch_size * config.data.seq_length
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items() if name not in ("total", "active"))
    return "\n".join(
        [
            dump_config(config).rstrip(),
            "",
            f"ranks: {world_size} ({', '.join(f'{name} {size}' for name, size in layout.items())})",
            *describe_experts(config.model.moe, parallel.expert_model_parallel_size),
            f"parameters: {counts['total']:,} in total, {counts['active']:,} active for a token ({parts})",
            f"batch: {training.global_batch_size} rows of {config.data.seq_length} positions = {positions:,} a step;"
            f" micro-batches on each data-parallel rank: {microbatches}",
            f"training: {training.steps:,} steps, {training.steps * positions:,} positions at most",
            f"memory per rank, without activations and communication buffers: {sum(memory.values()) / _GIB:.2f} GiB"
            f" ({', '.join(f'{name} {size / _GIB:.2f}' for name, size in memory.items())})",
        ]
    )


def describe_experts(moe: MoEConfig, expert_parallel_size: int) -> list[str]:
    """Pools and choices, and every expert-parallel rank's share of the pools: one line when all hold the same."""
    groups = ExpertGroups.from_config(moe, expert_parallel_size)
    pools = ", ".join(f"{name} {len(experts)}" for name, experts in groups.pools.items())
    choices = ", ".join(
        f"{group.modality} {group.top_k} of {len(choice)}"
        for group, choice in zip(moe.groups, groups.choices, strict=True)
    )
    lines = [f"experts in each MoE layer: {pools}; a token is sent to: {choices}"]
    shares = [
        tuple(len(experts) for experts in groups.local_experts(rank).values()) for rank in range(expert_parallel_size)
    ]
    if len(set(shares)) == 1:
        share = ", ".join(f"{name} {count}" for name, count in zip(groups.pools, shares[0], strict=True))
        return [*lines, f"each expert-parallel rank holds: {share}"]
    lines.append("expert-parallel ranks hold unequal shares of the pools, so their work follows the mix of modalities:")
    rows = [("rank", *groups.pools)]
    first = 0
    for share, ranks in itertools.groupby(shares):
        last = first + len(list(ranks)) - 1
        rows.append((str(first) if first == last else f"{first}-{last}", *map(str, share)))
        first = last + 1
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return lines + [
        "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
    ]


def memory_per_rank(config: RunConfig, world_size: int) -> dict[str, float]:
    """Bytes of ``weights``, fp32 ``gradients`` and ``optimizer`` state on the average rank.

    AdamW keeps two fp32 moments per parameter, and with bf16 weights an fp32 master copy; the distributed optimizer
    splits both over the data-parallel ranks that share the parameters.
    """
    parallel, counts = config.parallel, count_parameters(config)
    pipeline = parallel.pipeline_model_parallel_size
    expert_split = parallel.expert_tensor_size * parallel.expert_model_parallel_size * pipeline
    all_experts = sum(count for name, count in counts.items() if name.startswith("experts/"))
    dense = (counts["total"] - all_experts) / (parallel.tensor_model_parallel_size * pipeline)
    experts = all_experts / expert_split
    is_bf16 = config.training.precision == "bf16"
    state = 12 if is_bf16 else 8
    dense_share = parallel.data_parallel_size(world_size) * parallel.context_parallel_size
    expert_share = world_size // expert_split
    if not config.optimizer.distributed:
        dense_share = expert_share = 1
    return {
        "weights": (dense + experts) * (2 if is_bf16 else 4),
        "gradients": (dense + experts) * 4,
        "optimizer": state * (dense / dense_share + experts / expert_share),
    }
