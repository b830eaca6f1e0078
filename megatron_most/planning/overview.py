"""What --dry-run and ``most plan`` print: layout, parameters, FLOPs, batches, memory, time and disk of a run."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import fields

from megatron_most.config import MoEConfig, ParallelConfig, RunConfig, dump_config
from megatron_most.model import check_libraries, count_parameters
from megatron_most.model.most_model import padded
from megatron_most.moe import ExpertGroups
from megatron_most.planning.flops import forward_flops, train_flops_per_token
from megatron_most.planning.gpus import DEFAULT_IMBALANCE, GPUS, GPUS_PER_NODE
from megatron_most.planning.layouts import fitting_layouts
from megatron_most.planning.memory import MemoryEstimate, expert_load, memory_per_rank
from megatron_most.planning.rows import RowContents, row_contents
from megatron_most.planning.shards import code_rows, shard_sizes
from megatron_most.planning.step_time import step_seconds
from megatron_most.planning.storage import checkpoint_bytes, host_bytes_of_node, num_checkpoints
from megatron_most.training.muon import check_muon

_GIB = 1 << 30
_DAY = 24 * 3600


def smallest_world_size(parallel: ParallelConfig) -> int:
    """The fewest ranks on which both the dense part and the experts fit their layout."""
    experts = parallel.expert_tensor_size * parallel.expert_model_parallel_size * parallel.pipeline_model_parallel_size
    return math.lcm(parallel.model_parallel_size, experts)


def describe_run(config: RunConfig, world_size: int, imbalance: float = DEFAULT_IMBALANCE, gpu: str = "h100") -> str:
    """The resolved configuration and what follows from it on ``world_size`` ranks, as text for people.

    Raises:
        ConfigError: the layout does not fit ``world_size``, the batch does not fit the layout, or a library that the
            model needs is missing.
    """
    check_libraries(config)
    check_muon(config)
    parallel, training, rows = config.parallel, config.training, row_contents(config)
    data_parallel = parallel.data_parallel_size(world_size)
    microbatches = config.num_microbatches(data_parallel)
    layout = {
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "virtual stages": parallel.virtual_pipeline_model_parallel_size or 1,
        "context": parallel.context_parallel_size,
        "expert": parallel.expert_model_parallel_size,
        "expert tensor": parallel.expert_tensor_size,
        "data": data_parallel,
    }
    positions = positions_per_step(config)
    return "\n".join(
        [
            dump_config(config).rstrip(),
            "",
            f"ranks: {world_size} ({', '.join(f'{name} {size}' for name, size in layout.items())})",
            *describe_experts(config.model.moe, parallel.expert_model_parallel_size),
            *describe_parameters(config),
            f"batch: {training.global_batch_size} rows of {config.data.seq_length} positions = {positions:,} a step;"
            f" micro-batches on each data-parallel rank: {microbatches}",
            f"training: {training.train_iters:,} steps, {training.train_iters * positions:,} positions at most",
            *describe_rows(rows),
            *describe_flops(config, rows),
            *describe_shards(config),
            *describe_memory(config, world_size, imbalance, rows),
            *describe_time(config, world_size, gpu, imbalance, rows),
            *describe_storage(config, world_size),
        ]
    )


def describe_layouts(
    config: RunConfig, world_size: int, gpu: str, imbalance: float, limit: int, tflops: float | None = None
) -> str:
    """The first ``limit`` layouts that fit, as a table; the overrides that give the first one, its time and storage.

    Args:
        tflops: TFLOP/s of a GPU at which the days of the run are given, too.

    Raises:
        ConfigError: no layout fits.
    """
    layouts = fitting_layouts(config, world_size, GPUS[gpu], imbalance)
    names = ("tensor", "expert tensor", "pipeline", "virtual", "context", "expert", "recompute", "micro-batches")
    table: list[tuple[str, ...]] = [(*names, "GiB", "step, s", "time")]
    for layout in layouts[:limit]:
        parallel = layout.parallel
        sizes = (
            parallel.tensor_model_parallel_size,
            parallel.expert_tensor_size,
            parallel.pipeline_model_parallel_size,
            parallel.virtual_pipeline_model_parallel_size or 1,
            parallel.context_parallel_size,
            parallel.expert_model_parallel_size,
            layout.recompute,
            layout.micro_batches,
        )
        relative = f"{layout.seconds / layouts[0].seconds:.2f}"
        table.append((*map(str, sizes), f"{layout.memory / _GIB:.1f}", f"{layout.seconds:.3g}", relative))
    first = dataclasses.replace(
        config,
        parallel=layouts[0].parallel,
        training=dataclasses.replace(config.training, recompute=layouts[0].recompute),
    )
    return "\n".join(
        [
            f"{len(layouts)} layouts of {world_size} x {gpu} fit {GPUS[gpu].usable / _GIB:.1f} GiB; memory of the"
            " fullest rank and time of a step (first = 1) are estimates:",
            *align(table),
            f"the first as overrides: {' '.join(layouts[0].overrides(config)) or 'none, the configuration has it'}",
            *describe_time(first, world_size, gpu, imbalance, row_contents(config), tflops),
            *describe_storage(first, world_size),
        ]
    )


def positions_per_step(config: RunConfig) -> int:
    return config.training.global_batch_size * config.data.seq_length


def describe_parameters(config: RunConfig) -> list[str]:
    """Exact counts: of the whole model, of one token's way through it, of each part."""
    counts = count_parameters(config)
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items() if name not in ("total", "active"))
    lines = [f"parameters: {counts['total']:,} in total, {counts['active']:,} active for a token ({parts})"]
    tables = 1 if config.model.share_embeddings_and_output_weights else 2
    new_ids = padded(config.vocab.size) - config.vocab.text_vocab_size
    base = counts["total"] - config.model.hidden_size * (tables * new_ids + 2 * code_rows(config))
    lines.append(f"parameters without the ids, codes and padding that audio adds to the base model's tables: {base:,}")
    frozen = [part for part in config.part_names if config.lr_scale(part) == 0]
    return lines + ([f"frozen: {', '.join(frozen)}"] if frozen else [])


def describe_rows(rows: RowContents) -> list[str]:
    """What FLOPs, memory and time count of a row."""
    return [
        f"rows, {rows.source}: {_mix(rows)} of the positions; targets at {rows.targets:.0%}, of frames at"
        f" {rows.frame_targets:.0%}; attention to {rows.attended:,.0f} positions in the mean"
    ]


def describe_flops(config: RunConfig, rows: RowContents) -> list[str]:
    """Of a token of each modality, and of the average one."""
    by_modality = ", ".join(
        f"{name} {3 * sum(forward_flops(config, name, rows).values()) / 1e9:.2f}"
        for name in config.vocab.modality_names
    )
    mean = train_flops_per_token(config, rows)
    step = f"{mean * positions_per_step(config) / 1e15:,.3g} PFLOP a step"
    return [f"GFLOP to train on a token: {by_modality}; {mean / 1e9:.2f} at {_mix(rows)}, {step}"]


def describe_time(
    config: RunConfig,
    world_size: int,
    gpu: str,
    imbalance: float,
    rows: RowContents,
    tflops: float | None = None,
) -> list[str]:
    """The step by its parts, and the days of the run; nothing for fp32, whose speed is not estimated."""
    if config.precision.dtype != "bf16":
        return []
    parts = step_seconds(config, world_size, GPUS[gpu], imbalance, rows)
    total, positions = sum(parts.values()), positions_per_step(config)
    flops = train_flops_per_token(config, rows) * positions / world_size
    ordered = sorted(parts.items(), key=lambda item: -item[1])
    steps = config.training.train_iters
    days = f"{steps:,} steps: {steps * total / _DAY:,.2g} days at that speed"
    if tflops is not None:
        days += f", {steps * flops / (tflops * 1e12) / _DAY:,.2g} days at {tflops:g} TFLOP/s a GPU"
    return [
        f"a step on {gpu}, estimated by a roofline and not measured (docs/launch.md): {total:.3g} s,"
        f" {positions / total / world_size:,.0f} tokens/s and {flops / total / 1e12:.0f} TFLOP/s a GPU",
        "  " + ", ".join(f"{part} {seconds / total:.1%}" for part, seconds in ordered),
        f"{days}; validation and checkpoints come on top",
    ]


def describe_storage(config: RunConfig, world_size: int) -> list[str]:
    """Checkpoints on disk, and the host memory that saving takes."""
    size, count = checkpoint_bytes(config), num_checkpoints(config)
    written, most = host_bytes_of_node(config, world_size)
    return [
        f"a checkpoint: {size / 1e9:,.3g} GB on disk; at most {count} at once: {count * size / 1e9:,.3g} GB",
        f"host memory for saving, on each node of {min(world_size, GPUS_PER_NODE)}: {written / _GIB:,.3g} GiB while a"
        f" save is written in the background, {most / _GIB:,.3g} GiB for a moment before",
    ]


def _mix(rows: RowContents) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in rows.modalities.items())


def describe_shards(config: RunConfig) -> list[str]:
    """Parameters on every rank by part, exactly; ranks that hold equal sizes share a line."""
    parallel = config.parallel
    axes = {
        "pipeline rank": parallel.pipeline_model_parallel_size,
        "tensor rank": parallel.tensor_model_parallel_size,  # a rank's ids may be text, audio, or both
        "expert rank": parallel.expert_model_parallel_size,
    }

    def row(stage: int, tensor: int, expert: int) -> tuple[str, ...]:
        shard = shard_sizes(config, stage, expert, tensor)
        return (f"{sum(shard.values()):,}", *(f"{size:,}" for size in shard.values()))

    if parallel.tensor_model_parallel_size == 1:
        del axes["tensor rank"]
        return ["parameters on a rank:", *_by_place(axes, ("total", *config.part_names), lambda s, e: row(s, 0, e))]
    return ["parameters on a rank:", *_by_place(axes, ("total", *config.part_names), row)]


def describe_memory(config: RunConfig, world_size: int, imbalance: float, rows: RowContents) -> list[str]:
    """The estimate of every rank, and which GPUs it fits."""
    estimates = memory_per_rank(config, world_size, imbalance, rows)
    names = [field.name for field in fields(MemoryEstimate)]

    def row(stage: int, expert: int) -> tuple[str, ...]:
        estimate = estimates[stage, expert]
        return (f"{estimate.total / _GIB:.2f}", *(f"{getattr(estimate, name) / _GIB:.2f}" for name in names))

    parallel = config.parallel
    axes = {
        "pipeline rank": parallel.pipeline_model_parallel_size,
        "expert rank": parallel.expert_model_parallel_size,
    }
    worst = max(estimate.total for estimate in estimates.values())
    fits = ", ".join(f"{name}: {'yes' if worst <= gpu.usable else 'no'}" for name, gpu in GPUS.items())
    load = max(expert_load(config, rows))
    return [
        "memory on a rank, GiB, estimated:",
        *_by_place(axes, ("total", *(name.replace("_", " ") for name in names)), row),
        f"  (busiest expert-parallel rank: {load:.2f} of the mean at {_mix(rows)}, x {imbalance:g} for uneven routers)",
        f"fits, with room for CUDA and fragments: {fits}",
    ]


def describe_experts(moe: MoEConfig, expert_parallel_size: int) -> list[str]:
    """Pools and choices, and every expert-parallel rank's share of the pools: one line when all hold the same."""
    groups = ExpertGroups.from_config(moe, expert_parallel_size)
    pools = ", ".join(f"{name} {len(experts)}" for name, experts in groups.pools.items())
    choices = ", ".join(
        f"{group.modality} {group.moe_router_topk} of {len(choice)}"
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
    for counts, ranks in itertools.groupby(shares):
        last = first + len(list(ranks)) - 1
        rows.append((_span(first, last), *map(str, counts)))
        first = last + 1
    return lines + align(rows)


def _by_place(axes: dict[str, int], names: Sequence[str], row: Callable[..., tuple[str, ...]]) -> list[str]:
    """A table of ``row(*place)`` for every place of ``axes``, name -> size; places with equal rows share a line."""

    def lines(place: tuple[int, ...], sizes: list[int]) -> list[tuple[str, ...]]:
        if not sizes:
            return [row(*place)]
        found, first = [], 0
        for run, group in itertools.groupby(lines((*place, index), sizes[1:]) for index in range(sizes[0])):
            last = first + len(list(group)) - 1
            found += [(_span(first, last), *line) for line in run]
            first = last + 1
        return found

    return align([(*axes, *names), *lines((), list(axes.values()))])


def align(table: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, each column as wide as its widest cell, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
