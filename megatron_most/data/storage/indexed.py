"""Arrays on disk: Megatron ``IndexedDataset`` pairs (``.bin`` and ``.idx``), written completely or not at all."""

from __future__ import annotations

import contextlib
import functools
import os
import struct
import warnings
from pathlib import Path

import numpy as np
import torch

from megatron_most.errors import DataError

_INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, type, number of sequences, number of documents + 1

_INTEGERS = frozenset((1, 2, 3, 4, 5, 8))
"""Megatron's numbers of the types that ids, masks and codes may have; 6 and 7 are floats."""

_CHECKED_AT_ONCE = 1 << 20


@functools.cache
def _megatron():
    """Megatron's module. The import takes seconds, and its warnings are about packages that are not used here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def smallest_dtype(num_values: int) -> type[np.integer]:
    """The smallest integer type Megatron can store that holds ``0 .. num_values - 1``."""
    for dtype in (np.uint8, np.uint16, np.int32):
        if num_values - 1 <= np.iinfo(dtype).max:
            return dtype
    return np.int64


class ArrayWriter:
    """Writes one ``IndexedDataset`` pair under temporary names; :meth:`commit` renames it."""

    def __init__(self, prefix: str, dtype: type[np.integer]) -> None:
        self._prefix = prefix
        self._temporary = f"{prefix}.{os.getpid()}.tmp"
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        self._builder = _megatron().IndexedDatasetBuilder(self._temporary + ".bin", dtype=dtype)

    def add(self, values: np.ndarray) -> None:
        """Append one document: a 1-D array."""
        self._builder.add_item(torch.from_numpy(np.ascontiguousarray(values)))
        self._builder.end_document()

    def add_all(self, prefix: str) -> None:
        """Append every document of another pair with the same dtype."""
        self._builder.add_index(prefix)

    def commit(self) -> None:
        self._builder.finalize(self._temporary + ".idx")
        for ending in (".bin", ".idx"):
            os.replace(self._temporary + ending, self._prefix + ending)

    def discard(self) -> None:
        """Remove the temporary files; committed ones stay."""
        with contextlib.suppress(OSError):  # closing flushes, which fails again if the disk is full
            self._builder.data_file.close()
        for ending in (".bin", ".idx"):
            Path(self._temporary + ending).unlink(missing_ok=True)


def _check_index(path: str) -> None:
    """Megatron's reader meets a damaged index with an assertion, and its half-built objects print more errors."""
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        header = file.read(_INDEX_HEADER.size)
        file.seek(max(0, size - 8))
        last = int.from_bytes(file.read(8), "little")  # where the last document ends, in sequences
    if len(header) == _INDEX_HEADER.size:
        magic, version, kind, num_sequences, num_documents = _INDEX_HEADER.unpack(header)
        # Per sequence: its length (int32) and its start (int64). Per document: its first sequence (int64).
        expected = _INDEX_HEADER.size + num_sequences * (4 + 8) + num_documents * 8
        is_whole = size == expected and num_sequences > 0 and num_documents > 0 and last == num_sequences
        if magic == b"MMIDIDX\x00\x00" and version == 1 and is_whole and kind in _INTEGERS:
            return
    raise DataError(f"{path}: not the index of a Megatron dataset, or damaged")


def _check_pointers(path: str, lengths: np.ndarray, starts: np.ndarray) -> None:
    """Documents must follow one another: a damaged start would give another document without a word."""
    at = 0
    for first in range(0, len(lengths), _CHECKED_AT_ONCE):
        part = slice(first, first + _CHECKED_AT_ONCE)
        ends = at + np.cumsum(lengths[part], dtype=np.int64)
        if lengths[part].min() < 0 or not np.array_equal(starts[part], np.concatenate([[at], ends[:-1]])):
            raise DataError(f"{path}: damaged: its documents do not follow one another")
        at = int(ends[-1])


class ArrayReader:
    """Reads one ``IndexedDataset`` pair through a memory map; ``reader[i]`` is a read-only view of document ``i``."""

    def __init__(self, prefix: str) -> None:
        for ending in (".bin", ".idx"):
            if not Path(prefix + ending).is_file():
                raise DataError(f"dataset {prefix}: {prefix}{ending} is missing")
        _check_index(prefix + ".idx")
        index = _megatron().IndexedDataset(prefix).index
        dtype = np.dtype(index.dtype)
        self.lengths: np.ndarray = np.array(index.sequence_lengths)
        expected = int(self.lengths.sum(dtype=np.int64)) * dtype.itemsize
        actual = Path(prefix + ".bin").stat().st_size
        if actual != expected:
            raise DataError(f"dataset {prefix}: {prefix}.bin has {actual} bytes, the index needs {expected}")
        # Megatron's reader makes a new array for each document, which takes longer than reading a short one.
        self._values = np.asarray(np.memmap(prefix + ".bin", dtype, mode="r"))
        self._starts = index.sequence_pointers // dtype.itemsize
        _check_pointers(prefix + ".idx", self.lengths, self._starts)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        start = self._starts[index]
        return self._values[start : start + self.lengths[index]]

    def read(self, indices: np.ndarray, dtype: type[np.generic] | None = None) -> np.ndarray:
        """Documents ``indices``, concatenated, as ``dtype`` (default: as they are stored)."""
        starts = self._starts[indices]
        ends = starts + self.lengths[indices]
        parts = [self._values[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        return np.concatenate(parts, dtype=dtype, casting="unsafe")
