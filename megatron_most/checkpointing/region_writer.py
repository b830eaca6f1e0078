"""Writes a native checkpoint one region at a time, so that the whole model is never in memory.

The files are those of a training run (Megatron's ``torch_dist`` format). A region becomes a chunk of the format, and
any parallel layout can load the chunks it needs.
"""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
import torch.distributed as dist
from isal import isal_zlib
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_most.checkpointing import directory as directories
from megatron_most.checkpointing.directory import STATE
from megatron_most.checkpointing.metadata import METADATA, CheckpointMetadata
from megatron_most.checkpointing.regions import Region, TensorForm
from megatron_most.errors import CheckpointError, MostError, first_line
from megatron_most.files import remove, write_json
from megatron_most.parallel import fail, on_rank_zero

WRITTEN_AT_ONCE = 1 << 20
"""Bytes of a single write: with calls of 32 MB, some file systems take several times as long for the same data."""

_FILE_BYTES = 4 << 30
"""Size at which a new file is started, so that several ranks can verify a checkpoint together."""

_COMMON_STATE = ShardedObject("common_state", None, (1,), (0,)).unique_key
"""The key under which Megatron looks for everything but sharded tensors; empty in these checkpoints."""


def write_checkpoint(
    directory: Path,
    metadata: CheckpointMetadata,
    forms: Mapping[str, TensorForm],
    regions: Sequence[Region],
    produce: Callable[[Region], torch.Tensor],
    finish: Callable[[Path], None],
) -> None:
    """Write and commit a checkpoint that holds only weights. Each region is made while the last is written. Collective.

    The regions of all ranks together must cover every tensor of ``forms`` exactly once. A kill or an error leaves at
    most a ``.tmp-`` directory beside ``directory``, which the next call removes.

    Args:
        directory: the checkpoint to create; must not exist.
        forms: every tensor of the checkpoint, the same on all ranks.
        regions: the regions that this rank writes.
        produce: makes the tensor of a region; called in a thread, for one region after another.
        finish: called on every rank with the temporary directory when all tensors are written, before the commit. It
            may communicate, and add files on rank 0; an error in it stops the commit.

    Raises:
        CheckpointError: the storage cannot be written, regions overlap or leave a gap, or an error of ``produce`` or
            ``finish``.
    """
    temporary = directories.temporary_directory(directory)

    def prepare() -> None:
        if directory.exists():
            raise CheckpointError(f"{directory}: exists already; name a new directory")
        try:
            remove(temporary)
            (temporary / STATE).mkdir(parents=True)
            write_json(temporary / METADATA, metadata.to_dict(), CheckpointError)
        except OSError as error:
            raise CheckpointError(f"{temporary}: cannot be written: {error.strerror}") from error

    on_rank_zero(prepare)
    try:
        written = _write_state(temporary / STATE, forms, regions, produce)
        of_ranks: list[dict[str, directories.FileEntry]] = [{}] * dist.get_world_size()
        dist.all_gather_object(of_ranks, written)

        finish(temporary)

        def commit() -> None:
            try:
                entries = {f"{STATE}/{name}": entry for files in of_ranks for name, entry in files.items()}
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


class _RegionSavePlanner(DefaultSavePlanner):
    """Plans regions instead of a state dict. Each region is made shortly before it is written."""

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
        """Raise for a gap too: torch finds overlaps, but no gap on a single rank and no tensor without a region."""
        plans, metadata = super().create_global_plan(all_plans)
        for key, form in self._forms.items():
            entry = metadata.state_dict_metadata.get(key)
            chunks = entry.chunks if isinstance(entry, TensorStorageMetadata) else []
            written = sum(chunk.sizes.numel() for chunk in chunks)
            if written != math.prod(form.shape):
                raise CheckpointError(f"{written} of the {math.prod(form.shape)} elements of {key} are written")
        return plans, metadata

    def resolve_data(  # type: ignore[override]  # torch's hint leaves out the objects that it saves
        self, write_item: WriteItem
    ) -> torch.Tensor | list[dict]:
        if write_item.type is WriteItemType.BYTE_IO:
            return [{}]  # Megatron wraps the objects of a key in a list
        index, data = write_item.index, write_item.tensor_data
        assert index.offset is not None and data is not None
        region = Region(index.fqn, tuple(index.offset), tuple(data.chunk.sizes))
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
    """Writes one tensor while the next is made, and then frees it; torch's own writer keeps a tensor for each key.

    It computes size and CRC32 of a file while writing, so that the manifest needs no second pass.
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
                    # Start to write these bytes to storage now: fsync would have to wait for all of them at the end.
                    os.posix_fadvise(raw.fileno(), start, length, os.POSIX_FADV_DONTNEED)
                    results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
                    del piece, tensor  # free it before the one after the next is made
                    piece = next(pieces, None)
                raw.flush()
                os.fsync(raw.fileno())
            self.entries[name] = directories.FileEntry(stream.size, stream.crc32)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def _made_ahead(items: Sequence[WriteItem], planner: SavePlanner) -> Iterator[tuple[WriteItem, Any]]:
    """Each item with its tensor or object. A thread makes the next one while the caller writes this one."""
    with ThreadPoolExecutor(1) as maker:
        ahead = [maker.submit(planner.resolve_data, item) for item in items[:1]]
        for place, item in enumerate(items):
            tensor = ahead.pop().result()
            ahead += [maker.submit(planner.resolve_data, following) for following in items[place + 1 : place + 2]]
            yield item, tensor
            del tensor


def _with_own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor that is no view: of a view, ``torch.save`` writes the whole storage."""
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    content = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return torch.from_numpy(content).view(tensor.dtype).view(tensor.shape)


def _save(data: torch.Tensor | list[dict], stream: _SummingStream) -> None:
    """``torch.save`` without its own checksum, which would double the time; the manifest has a checksum."""
    has_checksum = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(data, cast(IO[bytes], stream))
    finally:
        torch.serialization.set_crc32_options(has_checksum)


class _SummingStream:
    """A binary file that computes its size and CRC32 while it is written from start to end."""

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
    """The strategy that Megatron calls to write the sharded part of a checkpoint."""

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
    """Write this rank's regions. Returns the files it wrote, by name, with their checksums."""
    strategy = _RegionSave(_RegionSavePlanner(forms, regions, produce))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch warns of interfaces that Megatron uses
            dist_checkpointing.save({}, str(state), strategy, validate_access_integrity=False)
    except torch_checkpoint.CheckpointException as error:
        _, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        line = cause if isinstance(cause, MostError) else f"{state.parent}: cannot be written: {first_line(cause)}"
        fail(CheckpointError(str(line)) if dist.get_rank() == 0 else None)
    except OSError as error:
        raise CheckpointError(f"{state.parent}: cannot be written: {first_line(error)}") from error
    return strategy.entries
