"""One rank's part of a checkpoint: all ranks plan it together, then each writes its own without the others.

Megatron's own strategies start a manager process and fork writers. That takes seconds even for small models, and hangs
if one of them fails to start.
"""

from __future__ import annotations

import dataclasses
import io
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megatron_most.checkpointing import directory as directories
from megatron_most.errors import CheckpointError, first_line


@dataclasses.dataclass(frozen=True)
class Written:
    """What a rank wrote: where each piece of a tensor is, and the files by name."""

    results: list[WriteResult]
    entries: dict[str, directories.FileEntry]


class RankSave:
    """The part of ``state`` that this rank writes. Creating one is a collective call; its methods are not.

    Args:
        directory: for the files of all ranks; an existing empty directory.
        state: tensors and objects as in torch's distributed checkpoints.
        copy: copy exactly the bytes that this rank writes to host memory, so that ``state`` may change meanwhile.
    """

    def __init__(self, directory: Path, state: dict[str, Any], copy: bool) -> None:
        self._directory = directory
        # A copy is already on the host, and a thread that copies ahead would use the first device.
        options: dict[str, Any] = {"per_thread_copy_ahead": 0} if copy else {}
        self._writer = FileSystemWriter(str(directory), **options)
        self._planner = _Planner(flatten_state_dict=False)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        is_first = rank == 0
        self._planner.set_up_planner(state, self._writer.storage_meta(), is_first)
        self._writer.set_up_storage_writer(is_first, rank=rank)
        mine = self._writer.prepare_local_plan(self._planner.create_local_plan())
        plans: list[Any] | None = [None] * world_size if is_first else None
        dist.gather_object(mine, plans)
        if plans is not None:
            plans, self._index = self._planner.create_global_plan(plans)
            plans = self._writer.prepare_global_plan(plans)
        received: list[Any] = [None]
        dist.scatter_object_list(received, plans)
        self._plan: SavePlan = self._planner.finish_plan(received[0])
        if copy:
            self._planner.hold_copies(self._plan)

    def write(self) -> Written:
        """Write this rank's files and compute their checksums.

        Raises:
            CheckpointError: the storage cannot be written, or :meth:`abandon` was called.
        """
        try:
            results = self._writer.write_data(self._plan, self._planner).value()
        except (OSError, RuntimeError) as error:
            reason = f"{first_line(error)} (rank {dist.get_rank()})"
            raise CheckpointError(f"{self._directory}: cannot be written: {reason}") from error
        names = {result.storage_data.relative_path for result in results}
        return Written(results, directories.checksum(self._directory, names))

    def abandon(self) -> None:
        """Make :meth:`write`, in another thread, stop after its current tensor."""
        self._planner.abandoned.set()

    def write_index(self, results: list[list[WriteResult]]) -> None:
        """Write the index of what all ranks wrote. Only on rank 0."""
        self._writer.finish(self._index, results)


class PlannedSave(TorchDistSaveShardedStrategy):
    """The strategy that Megatron calls to write the sharded part of a checkpoint. It only plans :attr:`rank_save`."""

    def __init__(self, copy: bool) -> None:
        super().__init__()
        self._copy = copy
        self.rank_save: RankSave

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        self.rank_save = RankSave(Path(checkpoint_dir), mcore_to_pyt_state_dict(by_key, False), self._copy)


class _Planner(MCoreSavePlanner):
    """Megatron's plan, in which copies may replace the tensors."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.abandoned = threading.Event()
        self._copies: dict[MetadataIndex, torch.Tensor | io.BytesIO] | None = None

    def hold_copies(self, plan: SavePlan) -> None:
        """Copy what ``plan`` writes and free the rest of the state, such as gathered tensors that other ranks write."""
        copies: dict[MetadataIndex, torch.Tensor | io.BytesIO] = {}
        for item in plan.items:
            data = self.resolve_data(item)
            if isinstance(data, torch.Tensor):
                data = torch.empty(data.shape, dtype=data.dtype).copy_(data.detach())
            copies[item.index] = data
        self._copies = copies
        self.state_dict: dict[str, Any] = {}

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if self.abandoned.is_set():
            raise RuntimeError("abandoned")
        if self._copies is None:
            return super().resolve_data(write_item)
        return self._copies.pop(write_item.index)  # to free its memory once the file is written
