"""Native checkpoints written and read a region at a time, so that no model ever lies in memory whole.

The files are those that a training job writes and reads (Megatron's ``torch_dist``): regions become the chunks of the
format, in the cuts that suit the writer, and whoever loads takes what it needs of them.
"""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from isal import isal_zlib
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_most.checkpointing import directory as directories
from megatron_most.checkpointing.directory import STATE
from megatron_most.checkpointing.metadata import METADATA, CheckpointMetadata
from megatron_most.errors import CheckpointError, MostError, first_line
from megatron_most.files import write_json
from megatron_most.parallel import fail, on_rank_zero

WRITTEN_AT_ONCE = 1 << 20
"""Bytes of a single write: some file systems take several times as long for the same bytes in calls of 32 MB."""

_FILE_BYTES = 4 << 30
"""After so many bytes a file ends: several ranks can check a checkpoint at the same time."""

_COMMON_STATE = ShardedObject("common_state", None, (1,), (0,)).unique_key
"""Where Megatron looks for what a checkpoint holds besides sharded tensors: nothing, in ours."""


@dataclass(frozen=True)
class Region:
    """A box of a native tensor: its key, where the box starts on each axis, and how long it is there."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class TensorForm:
    """Shape and element type of a whole native tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def write_checkpoint(
    directory: Path,
    metadata: CheckpointMetadata,
    forms: Mapping[str, TensorForm],
    regions: Sequence[Region],
    produce: Callable[[Region], torch.Tensor],
    finish: Callable[[Path], None],
) -> None:
    """Write and commit a checkpoint of weights alone; a region is made while the one before it is written. Collective.

    Every rank writes the regions it is given; together they must cover every tensor of ``forms`` exactly once. A kill
    or an error at any moment leaves at most a ``.tmp-`` directory beside ``directory``, which the next call removes.

    Args:
        directory: the checkpoint to make; must not exist.
        forms: every tensor of the checkpoint, the same on all ranks.
        regions: what this rank writes.
        produce: makes the tensor of a region; a thread calls it, for one region after the other.
        finish: called on rank 0 with the temporary directory when the tensors are there, before the commit; it may add
            files, and an error of it stops the commit.

    Raises:
        CheckpointError: the storage refused, regions overlap or leave a gap, or what ``produce`` and ``finish`` raise.
    """
    temporary = directories.temporary_directory(directory)

    def prepare() -> None:
        if directory.exists():
            raise CheckpointError(f"{directory}: exists already; name a directory that does not")
        try:
            if temporary.exists():
                shutil.rmtree(temporary)
            (temporary / STATE).mkdir(parents=True)
            write_json(temporary / METADATA, metadata.to_dict(), CheckpointError)
        except OSError as error:
            raise CheckpointError(f"{temporary}: cannot be written: {error.strerror}") from error

    on_rank_zero(prepare)
    try:
        written = _write_state(temporary / STATE, forms, regions, produce)
        shares: list[dict[str, directories.FileEntry]] = [{}] * dist.get_world_size()
        dist.all_gather_object(shares, written)

        def commit() -> None:
            try:
                finish(temporary)
                entries = {f"{STATE}/{name}": entry for share in shares for name, entry in share.items()}
                others = [name for name in directories.list_files(temporary) if name not in entries]
                directories.write_manifest(temporary, {**entries, **directories.checksum(temporary, others)})
                directories.commit(temporary, directory)
            except OSError as error:
                raise CheckpointError(f"{directory}: cannot be written: {error.strerror}") from error

        on_rank_zero(commit)
    except BaseException:
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


class StateReader:
    """Regions of the tensors that a checkpoint's ``state`` folder holds, whatever the layout that wrote them.

    ``forms`` has every tensor, those of the optimizer among them.
    """

    def __init__(self, state: Path) -> None:
        """Raises :class:`CheckpointError` when the folder's index cannot be read."""
        self._reader = torch_checkpoint.FileSystemReader(str(state))
        self._state = state
        try:
            metadata = self._reader.read_metadata()
        except Exception as error:  # a pickle: broken bytes raise anything
            raise CheckpointError(f"{state}: unreadable: {first_line(error)}") from None
        self._reader.set_up_storage_reader(metadata, True)
        entries = metadata.state_dict_metadata.items()
        self._tensors = {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}
        self.forms = {
            key: TensorForm(tuple(entry.size), entry.properties.dtype) for key, entry in self._tensors.items()
        }

    def read(self, region: Region, target: torch.Tensor | None = None) -> torch.Tensor:
        """The region in the type it is stored in, or copied into ``target`` of its sizes.

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
        """A whole tensor; errors as in :meth:`read`."""
        shape = tuple(self._tensors[key].size)
        return self.read(Region(key, (0,) * len(shape), shape))


class _RegionLoadPlanner(DefaultLoadPlanner):
    """Hands out views of one tensor for the pieces that are read into it."""

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


class _RegionSavePlanner(DefaultSavePlanner):
    """A plan of regions instead of a state dict; each is made shortly before it is written."""

    def __init__(
        self, forms: Mapping[str, TensorForm], regions: Sequence[Region], produce: Callable[[Region], torch.Tensor]
    ) -> None:
        super().__init__(flatten_state_dict=False)
        self._forms, self._regions, self._produce = forms, regions, produce

    def set_up_planner(self, state_dict: dict, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        items = [self._item(region) for region in self._regions]
        if self.is_coordinator:
            items.append(WriteItem(MetadataIndex(_COMMON_STATE), WriteItemType.BYTE_IO))
        self.plan = SavePlan(items)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """torch finds overlaps and raises, but sees no gap on a single rank, and no tensor that has no region."""
        plans, metadata = super().create_global_plan(all_plans)
        for key, form in self._forms.items():
            entry = metadata.state_dict_metadata.get(key)
            written = sum(math.prod(chunk.sizes) for chunk in entry.chunks) if entry else 0
            if written != math.prod(form.shape):
                raise CheckpointError(f"{written} of the {math.prod(form.shape)} elements of {key} are written")
        return plans, metadata

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | list[dict]:
        if write_item.type is WriteItemType.BYTE_IO:
            return [{}]  # as Megatron wraps the objects of a key
        index, chunk = write_item.index, write_item.tensor_data.chunk
        region = Region(index.fqn, tuple(index.offset), tuple(chunk.sizes))
        tensor, dtype = self._produce(region), self._forms[region.key].dtype
        if tuple(tensor.shape) != region.sizes or tensor.dtype != dtype:
            raise RuntimeError(f"{region}: made {tuple(tensor.shape)} {tensor.dtype} for {dtype}")
        return _with_own_storage(tensor)

    def _item(self, region: Region) -> WriteItem:
        form = self._forms[region.key]
        chunk = ChunkStorageMetadata(torch.Size(region.offsets), torch.Size(region.sizes))
        data = TensorWriteData(chunk, TensorProperties(dtype=form.dtype), torch.Size(form.shape))
        return WriteItem(MetadataIndex(region.key, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


class _RegionWriter(torch_checkpoint.FileSystemWriter):
    """Writes one tensor while the next is made, and forgets it, where torch's own writer keeps one for each key.

    Size and CRC32 of the files are known when they are written, so that the manifest needs no second reading.
    """

    def __init__(self, state: Path) -> None:
        super().__init__(str(state))
        self._state = state
        self.entries: dict[str, directories.FileEntry] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        pieces = _made_ahead(plan.items, planner)
        piece = next(pieces, None)
        while piece is not None:
            name = f"{plan.storage_data.prefix}{len(self.entries)}.distcp"
            with open(self._state / name, "wb") as raw:
                stream = _SummingStream(raw)
                while piece is not None and stream.size < _FILE_BYTES:
                    item, tensor = piece
                    start = stream.size
                    _save(tensor, stream)
                    length = stream.size - start
                    # Storage starts on these bytes now: it would take as long as all before it at the end.
                    os.posix_fadvise(raw.fileno(), start, length, os.POSIX_FADV_DONTNEED)
                    results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
                    del piece, tensor  # before the next one but one is made
                    piece = next(pieces, None)
                raw.flush()
                os.fsync(raw.fileno())
            self.entries[name] = directories.FileEntry(stream.size, stream.crc32)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def _made_ahead(items: Sequence[WriteItem], planner: SavePlanner) -> Iterator[tuple[WriteItem, Any]]:
    """Each item with its tensor or object; a thread makes the next one while the caller writes this one."""
    with ThreadPoolExecutor(1) as maker:
        ahead = maker.submit(planner.resolve_data, items[0]) if items else None
        for place, item in enumerate(items):
            tensor = ahead.result()
            ahead = maker.submit(planner.resolve_data, items[place + 1]) if place + 1 < len(items) else None
            yield item, tensor
            del tensor


def _with_own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as ``torch.save`` would write it: of a view it writes all that lies behind it."""
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    content = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return torch.from_numpy(content).view(tensor.dtype).view(tensor.shape)


def _save(data: torch.Tensor | list[dict], stream: _SummingStream) -> None:
    """``torch.save`` without its own checksum, which takes as long as all the rest: the manifest has one."""
    has_checksum = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(data, stream)
    finally:
        torch.serialization.set_crc32_options(has_checksum)


class _SummingStream:
    """A binary file, written from front to end."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.size, self.crc32 = stream, 0, 0

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data)
        for start in range(0, len(view), WRITTEN_AT_ONCE):
            part = view[start : start + WRITTEN_AT_ONCE]
            self.crc32 = isal_zlib.crc32(part, self.crc32)
            self._stream.write(part)
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        self._stream.flush()


class _RegionSave(TorchDistSaveShardedStrategy):
    """What Megatron calls to write the sharded part of a checkpoint."""

    def __init__(self, planner: _RegionSavePlanner) -> None:
        super().__init__()
        self._planner = planner
        self.entries: dict[str, directories.FileEntry] = {}

    def save(self, sharded_state_dict: dict, checkpoint_dir: str | Path) -> None:
        writer = _RegionWriter(Path(checkpoint_dir))
        torch_checkpoint.save({}, storage_writer=writer, planner=self._planner)
        self.entries = writer.entries


def _write_state(
    state: Path,
    forms: Mapping[str, TensorForm],
    regions: Sequence[Region],
    produce: Callable[[Region], torch.Tensor],
) -> dict[str, directories.FileEntry]:
    """Write this rank's regions; the files it wrote, by name, with their checksums."""
    strategy = _RegionSave(_RegionSavePlanner(forms, regions, produce))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's, of interfaces that Megatron uses
            dist_checkpointing.save({}, str(state), strategy, validate_access_integrity=False)
    except torch_checkpoint.CheckpointException as error:
        _, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        line = cause if isinstance(cause, MostError) else f"{state.parent}: cannot be written: {first_line(cause)}"
        fail(CheckpointError(str(line)) if dist.get_rank() == 0 else None)
    except OSError as error:
        raise CheckpointError(f"{state.parent}: cannot be written: {first_line(error)}") from error
    return strategy.entries
