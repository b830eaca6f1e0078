"""Checkpoints written by region: complete or absent, and readable in any other regions."""

from __future__ import annotations

import time
import weakref
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_most import parallel
from megatron_most.checkpointing import region_writer
from megatron_most.checkpointing.directory import STATE, read_manifest, verify_checksums
from megatron_most.checkpointing.metadata import CheckpointMetadata
from megatron_most.checkpointing.region_writer import write_checkpoint
from megatron_most.checkpointing.regions import Region, StateReader, TensorForm
from megatron_most.config import ParallelConfig
from megatron_most.errors import CheckpointError

TENSORS = {"a": torch.randn(60, 50), "b": torch.randn(2, 4, 3).bfloat16(), "c": torch.randn(7)}
FORMS = {key: TensorForm(tuple(tensor.shape), tensor.dtype) for key, tensor in TENSORS.items()}
WHOLE = [
    Region("a", (0, 0), (40, 50)),
    Region("a", (40, 0), (20, 50)),
    Region("b", (0, 0, 0), (1, 4, 3)),
    Region("b", (1, 0, 0), (1, 4, 3)),
    Region("c", (0,), (7,)),
]
METADATA = CheckpointMetadata(0, 0, 0, {}, None, None, 1, {}, {}, [])


@pytest.fixture(scope="module", autouse=True)
def process_groups():
    parallel.initialize(ParallelConfig(), seed=1)
    yield
    parallel.destroy()


def box(region: Region) -> torch.Tensor:
    """A view of the whole tensor, as a careless producer might return."""
    slices = tuple(slice(at, at + size) for at, size in zip(region.offsets, region.sizes, strict=True))
    return TENSORS[region.key][slices]


def write(directory: Path, regions: list[Region], finish=lambda made: None) -> None:
    write_checkpoint(directory, METADATA, FORMS, regions, box, finish)


def test_what_is_written_is_read_in_any_cut(tmp_path):
    write(tmp_path / "new", WHOLE)
    reader = StateReader(tmp_path / "new" / STATE)
    assert reader.forms == FORMS
    for key, tensor in TENSORS.items():
        assert torch.equal(reader.read_whole(key), tensor)
    for region in (Region("a", (39, 1), (2, 3)), Region("b", (0, 1, 0), (2, 2, 3)), Region("c", (2,), (3,))):
        assert torch.equal(reader.read(region), box(region))
    into = torch.zeros(2, 3)
    reader.read(Region("a", (39, 1), (2, 3)), into)
    assert torch.equal(into, TENSORS["a"][39:41, 1:4])
    verify_checksums(tmp_path / "new")


def test_large_checkpoints_are_several_files_and_views_are_written_without_what_is_behind_them(tmp_path, monkeypatch):
    write(tmp_path / "one", WHOLE)
    monkeypatch.setattr(region_writer, "_FILE_BYTES", 5000)
    write(tmp_path / "many", WHOLE)
    files = sorted(path.name for path in (tmp_path / "many" / STATE).glob("*.distcp"))
    assert len(files) > 1
    assert {f"{STATE}/{name}" for name in files} < read_manifest(tmp_path / "many").keys()
    verify_checksums(tmp_path / "many")
    assert all(torch.equal(StateReader(tmp_path / "many" / STATE).read_whole(key), TENSORS[key]) for key in TENSORS)
    # Each piece takes some 1.5 kB beside its bytes; views saved with their storage would take "a" twice.
    [file] = (tmp_path / "one" / STATE).glob("*.distcp")
    assert file.stat().st_size < 2 * TENSORS["a"].nbytes


def test_one_region_is_made_ahead_and_none_is_kept(tmp_path, monkeypatch):
    made: list[weakref.ref] = []
    alive: list[int] = []

    def count(region: Region) -> torch.Tensor:
        tensor = box(region).clone()
        made.append(weakref.ref(tensor))
        alive.append(sum(entry() is not None for entry in made))
        return tensor

    save = region_writer._save

    def wait_for_the_next(data: torch.Tensor | list[dict], stream: region_writer._SummingStream) -> None:
        place = len(saved)
        saved.append(type(data))
        deadline = time.monotonic() + 30
        while len(made) < min(place + 2, len(WHOLE)):  # it is made while this one is written
            assert time.monotonic() < deadline
            time.sleep(0.001)
        save(data, stream)

    saved: list[type] = []
    monkeypatch.setattr(region_writer, "_save", wait_for_the_next)
    write_checkpoint(tmp_path / "new", METADATA, FORMS, WHOLE, count, lambda directory: None)
    assert len(made) == len(WHOLE) and max(alive) == 2
    assert saved == [torch.Tensor] * len(WHOLE) + [list]  # the list is what a checkpoint has besides tensors


def test_what_goes_wrong_while_a_region_is_made_ahead_leaves_nothing(tmp_path):
    def spoilt(region: Region) -> torch.Tensor:
        if region.key == "c":
            raise CheckpointError("c is spoilt")
        return box(region)

    with pytest.raises(CheckpointError, match="c is spoilt"):
        write_checkpoint(tmp_path / "new", METADATA, FORMS, WHOLE, spoilt, lambda directory: None)
    assert list(tmp_path.iterdir()) == []


def test_no_write_is_larger_than_a_file_system_likes(tmp_path, monkeypatch):
    monkeypatch.setattr(region_writer, "WRITTEN_AT_ONCE", 1000)
    sizes: list[int] = []
    with open(tmp_path / "file", "wb") as raw:
        write_raw = raw.write
        stream = region_writer._SummingStream(
            SimpleNamespace(write=lambda part: sizes.append(len(part)) or write_raw(part))
        )
        assert stream.write(bytes(range(256)) * 10) == 2560
    assert sizes == [1000, 1000, 560] and stream.size == 2560
    content = (tmp_path / "file").read_bytes()
    assert content == bytes(range(256)) * 10 and stream.crc32 == zlib.crc32(content)


@pytest.mark.parametrize(
    ("regions", "match"),
    [
        (WHOLE[1:], "1000 of the 3000 elements of a are written"),
        ([*WHOLE, Region("a", (30, 0), (20, 50))], "cannot be written"),
        (WHOLE[:-1], "0 of the 7 elements of c are written"),
    ],
    ids=["gap", "overlap", "missing tensor"],
)
def test_regions_that_are_no_whole_checkpoint(tmp_path, regions, match):
    with pytest.raises(CheckpointError, match=match):
        write(tmp_path / "new", regions)
    assert list(tmp_path.iterdir()) == []


def test_what_goes_wrong_at_the_end_leaves_nothing(tmp_path):
    def finish(made: Path) -> None:
        assert (made / STATE / ".metadata").is_file() and not (tmp_path / "new").exists()
        raise CheckpointError("wrong after all")

    with pytest.raises(CheckpointError, match="wrong after all"):
        write(tmp_path / "new", WHOLE, finish)
    assert list(tmp_path.iterdir()) == []


def test_an_index_that_is_broken(tmp_path):
    write(tmp_path / "new", WHOLE)
    (tmp_path / "new" / STATE / ".metadata").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"state/.metadata: unreadable"):
        StateReader(tmp_path / "new" / STATE)
