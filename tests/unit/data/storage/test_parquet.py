"""Parquet files from others: small files that hold gigabytes, rows that cannot be used."""

import resource
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_most.data.storage.parquet import read_rows
from megatron_most.errors import DataError

ROOT = Path(__file__).parents[4]


def test_the_wanted_columns_of_all_rows_are_read(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"line {row}" for row in range(1000)], "other": range(1000), "id": range(1000)})
    parquet.write_table(table, path, row_group_size=300)
    assert list(read_rows(path, {"text", "id"})) == [{"text": f"line {row}", "id": row} for row in range(1000)]


def test_a_row_that_is_very_large_does_not_cost_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_most.data.storage.parquet._LARGEST_ROW", 1000)
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["a", "x" * 2000, "b"]}), path)
    assert list(read_rows(path, {"text"})) == [{"text": "a"}, "larger than 0 MiB", {"text": "b"}]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1"])
def test_what_is_no_parquet_is_one_line(tmp_path, content):
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with pytest.raises(DataError, match="not readable as Parquet") as caught:
        list(read_rows(path, {"text"}))
    assert "\n" not in str(caught.value)


def test_a_bomb_is_read_in_bounded_memory(tmp_path):
    """A file of a few hundred bytes with 4 GB of text."""
    path = tmp_path / "bomb.parquet"
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["y" * (4 << 20)]))
    parquet.write_table(pa.table({"text": repeated}), path, compression="zstd", row_group_size=1000)
    assert path.stat().st_size < 5000
    program = (
        "import sys\nfrom pathlib import Path\nfrom megatron_most.data.storage.parquet import read_rows\n"
        "rows = read_rows(Path(sys.argv[1]), {'text'})\nprint(sum(len(row['text']) for row in rows))\n"
    )
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))  # noqa: E731
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, preexec_fn=limit, cwd=ROOT
    )
    assert done.stdout.strip() == str(1000 * (4 << 20)), done.stderr[-500:]
