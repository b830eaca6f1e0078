"""Reads the pickles of a checkpoint without running the code that a pickle can name.

Torch keeps two kinds in a distributed checkpoint: the index ``.metadata``, which its readers open with ``pickle.load``,
and objects other than tensors, which they open with ``torch.load(weights_only=False)``.
"""

from __future__ import annotations

import contextlib
import os
import pickle  # nosec B403
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_most.errors import CheckpointError, first_line

INDEX = ".metadata"

_CLASSES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # its name in Python 3.13
}


class _IndexUnpickler(pickle.Unpickler):
    """Builds only what an index is made of."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if not is_dtype and (module, name) not in _CLASSES:
            raise pickle.UnpicklingError(f"names {module}.{name}, which no index needs and which could run code")
        return super().find_class(module, name)


def read_index(state: Path) -> Metadata:
    """The index of a checkpoint's ``state`` folder. Torch's own readers may open an index that this has read.

    Raises:
        CheckpointError: it is missing or broken, names anything that could run code, or a file outside the folder.
    """
    path = state / INDEX
    try:
        with open(path, "rb") as stream:
            index = _IndexUnpickler(stream).load()
        if not isinstance(index, Metadata):
            raise pickle.UnpicklingError(f"holds a {type(index).__name__}, not an index")
        files = {entry.relative_path for entry in (index.storage_data or {}).values()}
    except Exception as error:  # broken bytes can raise anything
        raise CheckpointError(f"{path}: unreadable: {first_line(error)}") from None
    for name in files:
        if not isinstance(name, str) or "/" in name or name in ("", ".", ".."):
            raise CheckpointError(f"{path}: names {name!r}, which is not a file of its folder")
    return index


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """Make every ``torch.load`` refuse code, also those in torch and Megatron that ask for ``weights_only=False``."""
    forced, forbidden = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name, None) for name in (forced, forbidden)}
    os.environ[forced] = "1"
    try:
        yield
    finally:
        del os.environ[forced]
        os.environ.update({name: value for name, value in before.items() if value is not None})
