"""Finds and loads the checkpoints of a run, whole or only their weights."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from megatron_most.checkpointing import directory as directories
from megatron_most.checkpointing.directory import STATE
from megatron_most.checkpointing.metadata import CheckpointMetadata, check_same_model, read_metadata
from megatron_most.checkpointing.state import load_model_state, load_state
from megatron_most.config import RunConfig
from megatron_most.errors import CheckpointError
from megatron_most.model import MoSTModel
from megatron_most.parallel import on_rank_zero, together


def find_checkpoint(path: str | Path, config: RunConfig) -> tuple[Path, CheckpointMetadata]:
    """A complete checkpoint of ``config``'s model. Its tensors are not read.

    Args:
        path: a checkpoint directory, or a run directory for its newest complete checkpoint.

    Raises:
        CheckpointError: missing, torn, or of another model.
    """
    directory = directories.resolve(path)
    metadata = read_metadata(directory)
    check_same_model(directory, metadata, config)
    return directory, metadata


def load_checkpoint(
    path: str | Path, config: RunConfig, model_chunks: list[MoSTModel], optimizer: MegatronOptimizer
) -> CheckpointMetadata:
    """Load weights, optimizer state, FP8 histories and step and, in the same layout, random states. Collective.

    FP8 histories that the checkpoint does not have start empty, as in a new run.

    Args:
        path: a checkpoint directory, or a run directory for its newest complete checkpoint.
        optimizer: a new optimizer that has not taken a step.

    Raises:
        CheckpointError: missing, torn, corrupt, or of another model.
    """
    directory, metadata = _verified(path, config)
    on_rank_zero(lambda: _check_same_optimizer(directory, metadata, config))
    theirs, mine = metadata.config["parallel"], config.parallel.sizes
    same_layout = metadata.world_size == dist.get_world_size() and mine == {name: theirs.get(name) for name in mine}
    had_frozen_parts = any(entry["scale"] == 0 for entry in metadata.config["optimizer"]["lr_scales"])
    load_state(directory / STATE, model_chunks, optimizer, metadata.num_updates, same_layout, had_frozen_parts)
    return metadata


def load_model_weights(path: str | Path, config: RunConfig, model_chunks: list[MoSTModel]) -> CheckpointMetadata:
    """Load only the weights, in any parallel layout. Arguments and errors as in :func:`load_checkpoint`. Collective."""
    directory, metadata = _verified(path, config)
    load_model_state(directory / STATE, model_chunks)
    return metadata


def _check_same_optimizer(directory: Path, metadata: CheckpointMetadata, config: RunConfig) -> None:
    theirs, mine = metadata.config["optimizer"].get("optimizer", "adam"), config.optimizer.optimizer
    if theirs != mine:
        raise CheckpointError(
            f"{directory}: holds the state of optimizer.optimizer={theirs!r}, not of {mine!r}; choose another run_dir"
            " and load only the weights with checkpoint.load"
        )


def _verified(path: str | Path, config: RunConfig) -> tuple[Path, CheckpointMetadata]:
    """Find a checkpoint and verify the content of every file; each file is read by one rank."""
    directory, metadata = on_rank_zero(lambda: find_checkpoint(path, config))
    together(lambda: directories.verify_checksums(directory, dist.get_rank(), dist.get_world_size()))
    return directory, metadata
