"""Starts torch.distributed and Megatron's process groups for a parallel layout."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_most import platform
from megatron_most.cli import launcher_integer
from megatron_most.config import ParallelConfig
from megatron_most.errors import ConfigError

_STAGE_STRIDE = 1 << 20
"""Distance between the seeds of two pipeline stages: more than Megatron adds for tensor and expert ranks (100 per
expert rank, random.py:428), and within the 32 bits of a seed that torch's CPU generator uses."""


def initialize(layout: ParallelConfig, seed: int) -> None:
    """Start torch.distributed from ``torchrun``'s environment, or for one process; build the groups and set all seeds.

    Raises:
        ConfigError: ``layout`` does not fit the world size, or the launcher's variables are no ranks; then nothing is
            started.
    """
    world_size = launcher_integer("WORLD_SIZE", 1, least=1)
    rank = launcher_integer("RANK", 0)
    if rank >= world_size:
        raise ConfigError(f"environment variable RANK={rank}: must be less than WORLD_SIZE, {world_size}")
    layout.data_parallel_size(world_size)
    if not dist.is_initialized():
        device = platform.device()
        if device.type == "cuda":
            torch.cuda.set_device(device)  # Megatron allocates on the current device
        # No device_id: with it, every group creates its communicator at once, even if unused, and a process with a few
        # megabytes of tensors took 8.8 GiB of an H100.
        dist.init_process_group(platform.backend(), timeout=layout.timeout, **_meeting_place(world_size))
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
        distributed_timeout_minutes=layout.distributed_timeout_minutes,
    )
    _seed_everything(seed)


def _seed_everything(seed: int) -> None:
    """Seed ranks that hold copies of a weight equally, and pipeline stages and shards differently.

    Routers are initialized on the CPU, so torch's CPU generator is seeded, too.
    """
    stage_seed = seed + _STAGE_STRIDE * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)


def destroy() -> None:
    """Undo :func:`initialize`."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def data_parallel_place() -> tuple[int, int]:
    """(rank, size) among the replicas that read different data. Context-parallel ranks read the same data."""
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def is_first_of_replica() -> bool:
    """Whether this rank is the first of its tensor, pipeline and context groups, one of those with the same data."""
    return (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_pipeline_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
    )


def whole_model_place() -> tuple[int, int]:
    """(rank, size) among the groups of ranks that hold the whole model, experts included, and can run without others.

    Expert tensor parallelism must be tensor parallelism.
    """
    return parallel_state.get_expert_data_parallel_rank(), parallel_state.get_expert_data_parallel_world_size()


def whole_model_group() -> dist.ProcessGroup:
    """The ranks that hold the whole model together with this one, where there are no pipeline stages."""
    return parallel_state.get_expert_tensor_and_model_parallel_group()


def is_rank_zero() -> bool:
    """Whether this is global rank 0. True before torch.distributed is started."""
    return not dist.is_initialized() or dist.get_rank() == 0


def speaks_for_model() -> bool:
    """Whether this is the first rank of :func:`whole_model_group`. True before torch.distributed is started."""
    return not dist.is_initialized() or dist.get_rank(whole_model_group()) == 0


def _meeting_place(world_size: int) -> dict[str, Any]:
    """Nothing for ranks that a launcher has told where to meet; a store of its own for a process that runs alone."""
    if world_size > 1 or "MASTER_PORT" in os.environ:
        return {}
    return {"store": dist.TCPStore("127.0.0.1", 0, is_master=True), "rank": 0, "world_size": 1}
