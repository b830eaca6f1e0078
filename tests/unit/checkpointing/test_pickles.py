"""Pickles of a checkpoint that name code: no reader runs it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata

from megatron_most import parallel
from megatron_most.checkpointing import directory as directories
from megatron_most.checkpointing import load_checkpoint, load_model_weights, save_checkpoint
from megatron_most.checkpointing.directory import STATE
from megatron_most.checkpointing.pickles import INDEX, read_index, weights_only
from megatron_most.checkpointing.regions import StateReader
from megatron_most.config import RunConfig
from megatron_most.errors import CheckpointError
from megatron_most.training.train_step import TrainState, build_train_state
from tests.distributed.tiny import tiny_config
from tests.unit.checkpointing.test_metadata import metadata_of


class Code:
    """Its pickle creates a file when it is read, and then gives ``value``, so that a reader would notice nothing."""

    def __init__(self, canary: Path, value: Any) -> None:
        self.canary, self.value = canary, value

    def __reduce__(self) -> tuple:
        source = (
            f"(open({str(self.canary)!r}, 'w').close(), __import__('pickle').loads({pickle.dumps(self.value)!r}))[1]"
        )
        return eval, (source,)


@pytest.fixture(autouse=True, scope="module")
def process_groups() -> Iterator[None]:
    parallel.initialize(tiny_config().parallel, seed=1)
    yield
    parallel.destroy()


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return tiny_config(model__num_layers=2, training__micro_batch_size=1, training__global_batch_size=1)


@pytest.fixture(scope="module")
def trained(config: RunConfig) -> TrainState:
    return build_train_state(config, lambda chunks: None)


@pytest.fixture
def checkpoint(config: RunConfig, trained: TrainState, tmp_path: Path) -> Path:
    return save_checkpoint(
        tmp_path, metadata_of(config, step=2, world_size=1), trained.model_chunks, trained.optimizer, keep_last=1
    )


def sign(checkpoint: Path) -> None:
    """Whoever forges a file can also write the checksum that fits it."""
    directories.write_manifest(checkpoint, directories.checksum(checkpoint, directories.list_files(checkpoint)))


def forge_index(state: Path, canary: Path) -> None:
    index = state / INDEX
    index.write_bytes(pickle.dumps(Code(canary, pickle.loads(index.read_bytes()))))


def forge_object(key: str) -> Callable[[Path, Path], None]:
    """Append code to a file of tensors, and let the index say that the object ``key`` is there."""

    def forge(state: Path, canary: Path) -> None:
        index = pickle.loads((state / INDEX).read_bytes())
        [(place, entry)] = [(place, entry) for place, entry in index.storage_data.items() if place.fqn.startswith(key)]
        file = state / entry.relative_path
        with open(file, "rb") as stream:
            stream.seek(entry.offset)
            (state / "object").write_bytes(stream.read(entry.length))
        value = torch.load(state / "object", weights_only=False)
        torch.save(Code(canary, value), state / "object")
        start = file.stat().st_size
        file.write_bytes(file.read_bytes() + (state / "object").read_bytes())
        index.storage_data[place] = _StorageInfo(file.name, start, file.stat().st_size - start)
        (state / "object").unlink()
        (state / INDEX).write_bytes(pickle.dumps(index))

    return forge


def forge_common(state: Path, canary: Path) -> None:
    """The file in which earlier versions of Megatron-Core kept what is no tensor."""
    torch.save({"content_metadata": Code(canary, {})}, state / "common.pt")


@pytest.mark.parametrize("forge", [forge_index, forge_object("common_state"), forge_object("rng"), forge_common])
def test_loading_runs_no_code(
    config: RunConfig, trained: TrainState, checkpoint: Path, forge: Callable[[Path, Path], None]
) -> None:
    canary = checkpoint / "canary"
    forge(checkpoint / STATE, canary)
    sign(checkpoint)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(checkpoint, config, trained.model_chunks, trained.optimizer)
    assert not canary.exists()
    assert str(checkpoint / STATE) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_reading_regions_and_weights_runs_no_code(config: RunConfig, trained: TrainState, checkpoint: Path) -> None:
    canary = checkpoint / "canary"
    forge_index(checkpoint / STATE, canary)
    sign(checkpoint)
    for read in (
        lambda: StateReader(checkpoint / STATE),
        lambda: load_model_weights(checkpoint, config, trained.model_chunks),
    ):
        with pytest.raises(CheckpointError, match=r"\.metadata: unreadable: names builtins.eval"):
            read()
    assert not canary.exists()


@pytest.mark.parametrize(
    "code",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"ctorch.hub\nload\n.",
        b"ctorch\nload\n.",
        b"\x80\x04\x8c\x28torch.distributed.checkpoint.metadata\x94\x8c\x11Metadata.__init__\x94\x93.",
        b"cpathlib\nPath\n.",
        b"}.",
        b"",
    ],
)
def test_an_index_of_anything_else_is_refused(tmp_path: Path, code: bytes) -> None:
    (tmp_path / INDEX).write_bytes(code)
    with pytest.raises(CheckpointError, match=r"\.metadata: unreadable"):
        read_index(tmp_path)


@pytest.mark.parametrize("name", ["../other", "/dev/zero", "a/b", "..", "", 3])
def test_an_index_names_only_files_of_its_folder(tmp_path: Path, name: Any) -> None:
    (tmp_path / INDEX).write_bytes(pickle.dumps(Metadata({}, storage_data={"a": _StorageInfo(name, 0, 1)})))
    with pytest.raises(CheckpointError, match="which is not a file of its folder"):
        read_index(tmp_path)


def test_the_environment_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with weights_only():
        assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
