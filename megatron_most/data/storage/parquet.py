"""Rows of Parquet files from others. A file of a few hundred bytes can hold gigabytes, so few rows are read at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_most.errors import DataError, first_line

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import parquet

_MOST_ROWS = 64
_AT_ONCE = 256 << 20
"""Bytes that are held at once, unless a single row is larger."""

_LARGEST_ROW = 64 << 20


def read_rows(path: Path, wanted: Collection[str] | None = None) -> Iterator[dict[str, Any] | str]:
    """Each row's values of those ``wanted`` columns that are there (None: all), or why the row cannot be used.

    Raises:
        DataError: the file is not readable as Parquet.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if wanted is None or name in wanted]
            for group in range(file.num_row_groups):
                rows = max(1, min(_MOST_ROWS, _AT_ONCE // max(1, _largest_value(file, group, columns))))
                for batch in file.iter_batches(rows, row_groups=[group], columns=columns):
                    yield from _rows(batch)
    except (pyarrow.ArrowException, OSError, MemoryError) as error:
        raise DataError(f"{path}: not readable as Parquet: {first_line(error)}") from None


def _largest_value(file: parquet.ParquetFile, group: int, columns: list[str]) -> int:
    """A bound on the bytes of a value: all rows may repeat one that is stored once."""
    stored = file.metadata.row_group(group)
    chunks = (stored.column(index) for index in range(stored.num_columns))
    sizes = (chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns)
    return max(sizes, default=0)


def _rows(batch: pyarrow.RecordBatch) -> Iterator[dict[str, Any] | str]:
    """One that is not UTF-8, or is very large, does not cost the others."""
    if batch.nbytes <= _LARGEST_ROW:
        try:
            yield from batch.to_pylist()
            return
        except UnicodeDecodeError:
            pass
    for place in range(batch.num_rows):
        row = batch.slice(place, 1)
        if row.nbytes > _LARGEST_ROW:
            yield f"larger than {_LARGEST_ROW >> 20} MiB"
            continue
        try:
            yield from row.to_pylist()
        except UnicodeDecodeError:
            yield "not UTF-8"
