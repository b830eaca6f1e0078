"""What the checkpoints of a run take, on disk and in the memory of hosts."""

from __future__ import annotations

import dataclasses

from megatron_most.config import ParallelConfig, RunConfig
from megatron_most.planning.gpus import GPUS_PER_NODE
from megatron_most.planning.memory import element_size, optimizer_state
from megatron_most.planning.shards import learning_sizes, shard_sizes


def checkpoint_bytes(config: RunConfig) -> int:
    """Size of a checkpoint: weights, and the optimizer state of the parts that learn."""
    whole = dataclasses.replace(config, parallel=ParallelConfig())
    state = optimizer_state(config, learning_sizes(whole, 0, 0))
    return sum(shard_sizes(whole, 0, 0).values()) * element_size(config) + sum(state.values())


def num_checkpoints(config: RunConfig) -> int:
    """The most that are on disk at once: those kept, and the one that is being written."""
    options, steps = config.checkpoint, config.training.train_iters
    saved = -(-steps // options.save_interval)  # the last step is saved, too
    retained = steps // options.save_retain_interval if options.save_retain_interval else 0
    return min(saved, options.keep_last + retained + 1)


def host_bytes_of_node(config: RunConfig, world_size: int) -> tuple[float, float]:
    """Host memory that saving takes on a node: while an asynchronous save is written, and at most, for a moment.

    A rank holds its share of the checkpoint. Before that, a rank with a distributed optimizer gathers the whole
    optimizer state of its parameters.
    """
    parallel, ranks = config.parallel, min(world_size, GPUS_PER_NODE)
    written = checkpoint_bytes(config) * ranks / world_size if config.checkpoint.async_save else 0.0
    if not config.optimizer.use_distributed_optimizer:
        return written, written
    gathered = max(
        sum(optimizer_state(config, learning_sizes(config, stage, expert)).values())
        for stage in range(parallel.pipeline_model_parallel_size)
        for expert in range(parallel.expert_model_parallel_size)
    )
    return written, written + gathered * ranks
