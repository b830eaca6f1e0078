"""Native sharded checkpoints: save, verify, find, load in any parallel layout."""

from megatron_most.checkpointing.directory import complete_checkpoints, remove_leftovers, resolve
from megatron_most.checkpointing.metadata import (
    CheckpointMetadata,
    Fingerprint,
    check_same_data,
    read_metadata,
)
from megatron_most.checkpointing.saving import CheckpointSave, save_checkpoint
from megatron_most.checkpointing.store import find_checkpoint, load_checkpoint, load_model_weights

__all__ = [
    "CheckpointMetadata",
    "CheckpointSave",
    "Fingerprint",
    "check_same_data",
    "complete_checkpoints",
    "find_checkpoint",
    "load_checkpoint",
    "load_model_weights",
    "read_metadata",
    "remove_leftovers",
    "resolve",
    "save_checkpoint",
]
