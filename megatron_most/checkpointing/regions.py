"""Regions of a native checkpoint's tensors, and a reader that loads one region at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_most.checkpointing.pickles import read_index
from megatron_most.errors import CheckpointError, first_line


@dataclass(frozen=True)
class Region:
    """A box in a native tensor: the tensor's key, and the start and the length of the box along each axis."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class TensorForm:
    """Shape and element type of a whole native tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class StateReader:
    """Reads regions of the tensors in a checkpoint's ``state`` folder, in whatever layout they were written.

    ``forms`` lists every tensor, including the optimizer's.
    """

    def __init__(self, state: Path) -> None:
        """Errors are those of :func:`read_index`."""
        self._reader = torch_checkpoint.FileSystemReader(str(state))
        self._state = state
        metadata = read_index(state)
        self._reader.set_up_storage_reader(metadata, True)
        entries = metadata.state_dict_metadata.items()
        self._tensors = {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}
        self.forms = {
            key: TensorForm(tuple(entry.size), entry.properties.dtype) for key, entry in self._tensors.items()
        }

    def read(self, region: Region, target: torch.Tensor | None = None) -> torch.Tensor:
        """The region as it is stored, or copied into ``target``, a tensor of its sizes.

        Raises:
            CheckpointError: it cannot be read.
        """
        entry = self._tensors[region.key]
        if target is None:
            target = torch.empty(region.sizes, dtype=entry.properties.dtype)
        box = ChunkStorageMetadata(torch.Size(region.offsets), torch.Size(region.sizes))
        items = create_read_items_for_chunk_list(region.key, entry, [box])
        try:
            self._reader.read_data(LoadPlan(items), _RegionLoadPlanner(target)).wait()
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{self._state}: {region.key} cannot be read: {first_line(error)}") from error
        return target

    def read_whole(self, key: str) -> torch.Tensor:
        """A whole tensor. Errors are those of :meth:`read`."""
        shape = tuple(self._tensors[key].size)
        return self.read(Region(key, (0,) * len(shape), shape))


class _RegionLoadPlanner(DefaultLoadPlanner):
    """Gives torch the views of ``target`` into which it reads the pieces of a region."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        view = self._target
        for axis, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(axis, offset, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass
