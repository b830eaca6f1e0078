"""Readers of files from others. Each takes any bytes: it reads them, or says in one line why not."""

import functools
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_most.errors import MostError


@functools.cache
def folder() -> Path:
    """A folder in memory where there is one; it goes with the process."""
    memory = Path("/dev/shm")
    holder = tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)
    folder.holder = holder  # type: ignore[attr-defined]
    return Path(holder.name)


def config(data: bytes) -> None:
    from megatron_most.config import load_config

    path = folder() / "run.yaml"
    path.write_bytes(data)
    load_config(path)


def checkpoint(data: bytes) -> None:
    """``checkpoint.json``, with the checksum that fits it."""
    from megatron_most.checkpointing.directory import checksum, write_manifest
    from megatron_most.checkpointing.metadata import METADATA, read_metadata

    directory = folder() / "step_00000008"
    directory.mkdir(exist_ok=True)
    (directory / METADATA).write_bytes(data)
    write_manifest(directory, checksum(directory, [METADATA]))
    read_metadata(directory)


def index(data: bytes) -> None:
    """``state/.metadata``, a pickle."""
    from megatron_most.checkpointing.pickles import INDEX, read_index

    (folder() / INDEX).write_bytes(data)
    read_index(folder())


def nemo(data: bytes) -> None:
    """``model_config.yaml`` of a ``.nemo`` file."""
    from megatron_most.audio.nemo_archive import codec_config

    codec_config(data)


def manifest(data: bytes) -> None:
    from megatron_most.data.preparation.manifest import Rejection, iterate_manifest
    from megatron_most.data.storage.json_lines import read_lines

    path = folder() / "manifest.jsonl"
    path.write_bytes(data)
    for item in iterate_manifest(path, read_lines(path)):
        if isinstance(item, Rejection):
            assert "\n" not in item.reason and len(item.reason) < 1000
        json.dumps(item.to_entry())


def indexed(data: bytes) -> None:
    """``.idx`` of a dataset, beside a ``.bin`` of eight numbers."""
    from megatron_most.data.storage.indexed import ArrayReader

    prefix = folder() / "dataset"
    Path(f"{prefix}.idx").write_bytes(data)
    np.arange(8, dtype=np.uint16).tofile(f"{prefix}.bin")
    reader = ArrayReader(str(prefix))
    assert sum(len(reader[place]) for place in range(len(reader))) == int(reader.lengths.sum())


def safetensors(data: bytes) -> None:
    """The weights of a Hugging Face folder."""
    from megatron_most.conversion.hugging_face import HuggingFaceModel

    directory = folder() / "model"
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(data)
    model = HuggingFaceModel(directory)
    for name, entry in model.tensors.items():
        if entry.shape and entry.num_bytes:
            model.read(name)


def audio(data: bytes) -> None:
    from megatron_most.audio import read_audio

    read_audio(io.BytesIO(data), 16000)


READERS: dict[str, Callable[[bytes], None]] = {
    reader.__name__: reader for reader in (config, checkpoint, index, nemo, manifest, indexed, safetensors, audio)
}


def read(name: str, data: bytes) -> str:
    """The line with which a reader refuses ``data``, empty if it does not. Any other error is a finding."""
    try:
        READERS[name](data)
    except (MostError, ValueError) as error:
        # Only what reads a part of a file raises ValueError; its caller names the file.
        if not isinstance(error, MostError) and name != "nemo":
            raise
        line = str(error)
        assert line and "\n" not in line and len(line) < 2000, f"not one line: {line[:3000]!r}"
        return line
    return ""
