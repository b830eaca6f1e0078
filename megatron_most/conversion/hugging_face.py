"""A model in Hugging Face's folder layout, read lazily: configuration, and tensors out of mapped files.

A folder comes from elsewhere and is not trusted: every file it names must lie in it, the index must say what the files
hold, and nothing is unpickled unless it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_most.errors import CheckpointError, first_line
from megatron_most.files import read_json

CONFIG = "config.json"
MODEL = "model"
"""Stem of the files with weights."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Element types that weights may have, by their name in safetensors."""


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor is and what it looks like."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class _File(Protocol):
    """An open file of tensors."""

    entries: dict[str, TensorEntry]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor: ...


class HuggingFaceModel:
    """The tensors of a folder, each read when it is asked for.

    Args:
        directory: holds ``config.json`` and the weights.
        stem: of the files' names; ``model`` is the model itself.
        allow_pickle: read ``pytorch_model.bin`` files where there are no safetensors; weights only, no code.
    """

    def __init__(self, directory: str | Path, allow_pickle: bool = False, stem: str = MODEL) -> None:
        """Raises :class:`CheckpointError` for whatever is missing, broken or contradicts itself."""
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(f"{directory}: no such directory")
        self.config = read_json(self.path_of(CONFIG), CheckpointError)
        index, opener, files = self._find_weights(allow_pickle, stem)
        self._files: dict[str, _File] = {}
        for name in files:
            path = self.path_of(name)
            if not path.is_file():
                raise CheckpointError(f"{self.directory}: {name} is missing")
            self._files[name] = opener(path, name)
        self.tensors: dict[str, TensorEntry] = {}
        for file in self._files.values():
            for name, entry in file.entries.items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"{self.directory}: tensor {name} is in {self.tensors[name].file} and in {entry.file}"
                    )
                self.tensors[name] = entry
        if index is not None:
            self._check_index(index)

    def read(self, name: str, start: int = 0, rows: int | None = None) -> torch.Tensor:
        """``rows`` rows of a tensor from ``start`` on, all by default; a view of the file as long as nobody writes.

        Raises:
            CheckpointError: a value is not finite.
        """
        entry = self.tensors[name]
        stop = entry.shape[0] if rows is None else start + rows
        tensor = self._files[entry.file].rows(name, start, stop)
        if not is_finite(tensor):
            raise CheckpointError(f"{self.directory / entry.file}: tensor {name} holds values that are not finite")
        return tensor

    def path_of(self, name: str) -> Path:
        """A file of the folder. Links may lead within the folder, and from a hub cache's snapshot to its blobs."""
        path = self.directory / name
        if Path(name).name != name:
            raise CheckpointError(f"{self.directory}: {name!r} is no file name")
        home = self.directory.resolve()
        allowed = [home]
        if home.parent.name == "snapshots":
            allowed.append(home.parent.parent / "blobs")
        if path.is_symlink() and not any(path.resolve().is_relative_to(folder) for folder in allowed):
            raise CheckpointError(f"{path}: links to {path.resolve()}, outside of the directory")
        return path

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.tensors.values())

    def _find_weights(self, allow_pickle: bool, stem: str) -> tuple[dict[str, str] | None, type, list[str]]:
        """The index, if any, the reader of the files, and their names."""
        kinds = [(f"{stem}.safetensors", _Safetensors)]
        if stem == MODEL:
            kinds.append(("pytorch_model.bin", _Pickle))
        for single, opener in kinds:
            index = f"{single}.index.json"
            found = next((name for name in (index, single) if (self.directory / name).exists()), None)
            if found is None:
                continue
            if opener is _Pickle and not allow_pickle:
                raise CheckpointError(
                    f"{self.directory / found}: is a pickle, which can hold code; take safetensors, or give"
                    " --allow-pickle to read its weights alone"
                )
            if found == single:
                return None, opener, [single]
            weight_map = read_json(self.path_of(index), CheckpointError).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise CheckpointError(f"{self.directory / index}: holds no weight_map of names to files")
            return weight_map, opener, sorted(set(weight_map.values()))
        raise CheckpointError(f"{self.directory}: holds neither {kinds[0][0]} nor {kinds[0][0]}.index.json")

    def _check_index(self, index: dict[str, str]) -> None:
        for name, file in index.items():
            if name not in self.tensors:
                raise CheckpointError(f"{self.directory}: the index says {file} holds {name}, which is in no file")
            if self.tensors[name].file != file:
                raise CheckpointError(
                    f"{self.directory}: the index says {file} holds {name}, which is in {self.tensors[name].file}"
                )
        extra = sorted(self.tensors.keys() - index.keys())
        if extra:
            raise CheckpointError(
                f"{self.directory / self.tensors[extra[0]].file}: tensor {extra[0]} is not in the index"
            )


class _Safetensors:
    """A safetensors file, mapped."""

    def __init__(self, path: Path, name: str) -> None:
        import safetensors

        try:
            self._file = safetensors.safe_open(path, framework="pt")
            slices = {key: self._file.get_slice(key) for key in self._file.keys()}  # noqa: SIM118 (no dictionary)
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{path}: unreadable: {first_line(error)}") from None
        self.entries = {}
        for key, view in slices.items():
            if view.get_dtype() not in DTYPES:
                raise CheckpointError(
                    f"{path}: tensor {key} is of type {view.get_dtype()}; weights must be {', '.join(DTYPES)}"
                )
            self.entries[key] = TensorEntry(name, tuple(view.get_shape()), DTYPES[view.get_dtype()])

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._file.get_slice(name)[start:stop]


class _Pickle:
    """A file of ``torch.save``, mapped and read without running what it may hold."""

    def __init__(self, path: Path, name: str) -> None:
        try:
            content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # whatever broken bytes raise
            reason = first_line(error).partition(". ")[0]
            raise CheckpointError(f"{path}: unreadable as weights alone: {reason}") from None
        if not isinstance(content, dict) or not all(torch.is_tensor(value) for value in content.values()):
            raise CheckpointError(f"{path}: must hold a dictionary of tensors")
        wrong = [key for key, value in content.items() if value.dtype not in DTYPES.values()]
        if wrong:
            raise CheckpointError(
                f"{path}: tensor {wrong[0]} is of type {content[wrong[0]].dtype}; weights must be {', '.join(DTYPES)}"
            )
        self._content = content
        self.entries = {key: TensorEntry(name, tuple(value.shape), value.dtype) for key, value in content.items()}

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._content[name][start:stop]


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are; twenty times as fast as ``isfinite``, as a NaN is both extremes of its company."""
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))
