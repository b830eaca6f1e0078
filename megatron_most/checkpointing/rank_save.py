"""What one rank writes of a checkpoint, planned by all ranks together and then written without any other rank.

Megatron's own strategies for this start a manager process and fork writers, which costs seconds on small models and
waits forever when one of them fails to start.
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
    """What a rank has written: where each piece of a tensor lies, and the files by name."""

    results: list[WriteResult]
    entries: dict[str, directories.FileEntry]


class RankSave:
    """What this rank writes of ``state``. Making one is a collective call; its methods are not.

    Args:
        directory: for the files of all ranks; there and empty.
        state: tensors and objects as torch's distributed checkpoints know them.
        copy: hold a copy in host memory, of exactly the bytes this rank writes, so that ``state`` may change while
            they are written.
    """

    def __init__(self, directory: Path, state: dict[str, Any], copy: bool) -> None:
        self._directory = directory
        # A copy is on the host already, and a thread that copies from a device would choose the first one.
        self._writer = FileSystemWriter(str(directory), **({"per_thread_copy_ahead": 0} if copy else {}))
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
        """Write this rank's files and take their checksums.

        Raises:
            CheckpointError: the storage refused, or :meth:`abandon` was called.
        """
        try:
            results = self._writer.write_data(self._plan, self._planner).value()
        except (OSError, RuntimeError) as error:
            reason = f"{first_line(error)} (rank {dist.get_rank()})"
            raise CheckpointError(f"{self._directory}: cannot be written: {reason}") from error
        names = {result.storage_data.relative_path for result in results}
        return Written(results, directories.checksum(self._directory, names))

    def abandon(self) -> None:
        """Make :meth:`write`, in another thread, end after the tensor it is at."""
        self._planner.abandoned.set()

    def write_index(self, results: list[list[WriteResult]]) -> None:
        """Add the index of what all ranks have written. Only on rank 0."""
        self._writer.finish(self._index, results)


class PlannedSave(TorchDistSaveShardedStrategy):
    """What Megatron calls to write the sharded part of a checkpoint; it leaves the writing to :attr:`rank_save`."""

    def __init__(self, copy: bool) -> None:
        super().__init__()
        self._copy = copy
        self.rank_save: RankSave

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        self.rank_save = RankSave(Path(checkpoint_dir), mcore_to_pyt_state_dict(by_key, False), self._copy)


class _Planner(MCoreSavePlanner):
    """Megatron's plan; its tensors may be replaced by copies."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.abandoned = threading.Event()
        self._copies: dict[MetadataIndex, torch.Tensor | io.BytesIO] | None = None

    def hold_copies(self, plan: SavePlan) -> None:
        """Copy what ``plan`` writes and let go of all else: whole gathered states, copies of other ranks' shares."""
        copies: dict[MetadataIndex, torch.Tensor | io.BytesIO] = {}
        for item in plan.items:
            data = self.resolve_data(item)
            if isinstance(data, torch.Tensor):
                data = torch.empty(data.shape, dtype=data.dtype).copy_(data.detach())
            copies[item.index] = data
        self._copies, self.state_dict = copies, {}

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if self.abandoned.is_set():
            raise RuntimeError("abandoned")
        if self._copies is None:
            return super().resolve_data(write_item)
        return self._copies.pop(write_item.index)  # so that its memory is free when the file is written
