"""Saving and loading a training run's checkpoints, and loading weights alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from megatron_most.checkpointing import directory as directories
from megatron_most.checkpointing.metadata import METADATA, CheckpointMetadata, check_same_model, read_metadata
from megatron_most.checkpointing.state import load_model_state, load_state, save_state
from megatron_most.config import RunConfig
from megatron_most.errors import CheckpointError
from megatron_most.model import MoSTModel
from megatron_most.parallel import on_rank_zero, together

_STATE = "state"


def save_checkpoint(
    run_dir: str | Path,
    metadata: CheckpointMetadata,
    model_chunks: list[MoSTModel],
    optimizer: MegatronOptimizer,
    keep_last: int,
) -> Path:
    """Write and commit the checkpoint of ``metadata.step``, then delete all but the ``keep_last`` newest.

    A collective call. A kill at any moment leaves the earlier checkpoints and at most a ``.tmp-`` directory.

    Raises:
        CheckpointError: the storage refused.
    """
    directory = directories.step_directory(run_dir, metadata.step)
    temporary = directories.temporary_directory(directory)

    def prepare() -> None:
        try:
            if temporary.exists():
                shutil.rmtree(temporary)
            (temporary / _STATE).mkdir(parents=True)
            directories.write_json(temporary / METADATA, metadata.to_dict())
        except OSError as error:
            raise CheckpointError(f"{temporary}: cannot be written: {error.strerror}") from error

    on_rank_zero(prepare)
    save_state(temporary / _STATE, model_chunks, optimizer)
    dist.barrier()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine = together(lambda: directories.checksum(temporary, directories.list_files(temporary)[rank::world_size]))
    shares: list[dict[str, directories.FileEntry]] = [{}] * world_size
    dist.all_gather_object(shares, mine)

    def commit() -> None:
        try:
            directories.write_manifest(temporary, {name: entry for share in shares for name, entry in share.items()})
            directories.commit(temporary, directory)
            directories.keep_newest(run_dir, keep_last)
        except OSError as error:
            raise CheckpointError(f"{directory}: cannot be committed: {error.strerror}") from error

    on_rank_zero(commit)
    return directory


def find_checkpoint(path: str | Path, config: RunConfig) -> tuple[Path, CheckpointMetadata]:
    """A checkpoint that is complete and of ``config``'s model; the content of its tensors is not read.

    Args:
        path: a checkpoint directory, or a run directory for its newest complete one.

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
    """Continue from a checkpoint: weights, optimizer state, step and, in the same layout, random states. Collective.

    Args:
        path: a checkpoint directory, or a run directory for its newest complete one.
        optimizer: fresh, without a step taken.

    Raises:
        CheckpointError: missing, torn, corrupt, or of another model.
    """
    directory, metadata = _verified(path, config)
    theirs, mine = metadata.config["parallel"], vars(config.parallel)
    same_layout = metadata.world_size == dist.get_world_size() and theirs == mine
    had_frozen_parts = any(entry["scale"] == 0 for entry in metadata.config["optimizer"]["lr_scales"])
    load_state(directory / _STATE, model_chunks, optimizer, metadata.step, same_layout, had_frozen_parts)
    return metadata


def load_model_weights(path: str | Path, config: RunConfig, model_chunks: list[MoSTModel]) -> CheckpointMetadata:
    """Load only the weights, in whatever layout ``model_chunks`` were built. Arguments, errors as above. Collective."""
    directory, metadata = _verified(path, config)
    load_model_state(directory / _STATE, model_chunks)
    return metadata


def _verified(path: str | Path, config: RunConfig) -> tuple[Path, CheckpointMetadata]:
    """Find and check a checkpoint, the content of every file included, each read by one rank."""
    directory, metadata = on_rank_zero(lambda: find_checkpoint(path, config))
    together(lambda: directories.verify_checksums(directory, dist.get_rank(), dist.get_world_size()))
    return directory, metadata
