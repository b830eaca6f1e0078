"""Reads a Hugging Face model folder lazily: its configuration, and single tensors from mapped files.

A downloaded folder is not trusted: every file it names must be inside it, its index must match its files, and pickles
are read only on request.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_most.errors import CheckpointError, first_line
from megatron_most.files import read_json
from megatron_most.text.stop_ids import GENERATION_CONFIG

CONFIG = "config.json"
MODEL = "model"
"""Stem of the names of weight files."""
TOKENIZER_FILES = (
    # The first two are tokenizers; the others go with them.
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    GENERATION_CONFIG,
)
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Element types that weights may have, by their names in safetensors."""


@dataclass(frozen=True)
class TensorEntry:
    """The file, shape and element type of a tensor."""

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
    """The tensors of a folder, read on demand.

    Args:
        directory: holds ``config.json`` and the weights.
        stem: start of the names of the weight files; ``model`` for the model itself.
        allow_pickle: read ``pytorch_model.bin`` files if there are no safetensors; weights only, no code.
    """

    def __init__(self, directory: str | Path, allow_pickle: bool = False, stem: str = MODEL) -> None:
        """Raises :class:`CheckpointError` if a file is missing or broken, or if two files contradict each other."""
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(f"{directory}: no such directory")
        self.config = read_json(self.path_of(CONFIG), CheckpointError)
        opener, files, index = self._find_weights(allow_pickle, stem)
        self._files = {name: opener(self.path_of(name), name) for name in files}
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
        """``rows`` rows of a tensor from row ``start``, by default all. May be a view of the mapped file: do not write.

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
        """Path of a file in the folder. A link must stay in it, or lead from a hub cache's snapshot to a blob.

        Raises:
            CheckpointError: the name is a path, or a link that leads elsewhere.
        """
        path = self.directory / name
        if Path(name).name != name:
            raise CheckpointError(f"{self.directory}: {name!r} is not a file name")
        home = self.directory.resolve()
        allowed = [home]
        if home.parent.name == "snapshots":
            allowed.append(home.parent.parent / "blobs")
        if path.is_symlink() and not any(path.resolve().is_relative_to(folder) for folder in allowed):
            raise CheckpointError(f"{path}: links to {path.resolve()}, outside the directory")
        return path

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.tensors.values())

    def _find_weights(
        self, allow_pickle: bool, stem: str
    ) -> tuple[Callable[[Path, str], _File], list[str], dict[str, str] | None]:
        """The reader of the weight files, their names, and the index (tensor -> file) if there is one."""
        kinds: list[tuple[str, Callable[[Path, str], _File]]] = [(f"{stem}.safetensors", _Safetensors)]
        if stem == MODEL:
            kinds.append(("pytorch_model.bin", _Pickle))
        for single, opener in kinds:
            index_name = f"{single}.index.json"
            found = next((name for name in (index_name, single) if (self.directory / name).exists()), None)
            if found is None:
                continue
            if opener is _Pickle and not allow_pickle:
                raise CheckpointError(
                    f"{self.directory / found}: is a pickle, which can hold code; use safetensors, or pass"
                    " --allow-pickle to read only its weights"
                )
            index = self._read_index(index_name) if found == index_name else None
            files = [single] if index is None else sorted(set(index.values()))
            self._check_files(single, found, files)
            return opener, files, index
        raise CheckpointError(f"{self.directory}: holds neither {kinds[0][0]} nor {kinds[0][0]}.index.json")

    def _read_index(self, name: str) -> dict[str, str]:
        weight_map = read_json(self.path_of(name), CheckpointError).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{self.directory / name}: holds no weight_map of names to files")
        return weight_map

    def _check_files(self, single: str, found: str, files: list[str]) -> None:
        """Raise unless the weight files of the folder are exactly ``files``.

        An index left over from an earlier download or save names other files than those that hold the model now.

        Args:
            single: name of the file that holds a model whole.
            found: that file, or the index, whichever says what ``files`` are.
        """
        missing = [name for name in files if not self.path_of(name).is_file()]
        stem, suffix = map(re.escape, single.rsplit(".", 1))
        pattern = re.compile(rf"{stem}(-\d+-of-\d+)?\.{suffix}")
        present = [path.name for path in self.directory.iterdir() if pattern.fullmatch(path.name)]
        extra = sorted(set(present) - set(files))
        if extra and found == single:
            raise CheckpointError(f"{self.directory}: holds both {single} and {extra[0]}; remove the one that is old")
        if extra:
            raise CheckpointError(f"{self.directory}: {found} does not name {extra[0]}; remove the one that is old")
        if missing:
            raise CheckpointError(f"{self.directory}: {missing[0]} is missing, which {found} names")

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
    """A mapped safetensors file."""

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
    """A mapped file of ``torch.save``, read without running code that it may hold."""

    def __init__(self, path: Path, name: str) -> None:
        try:
            content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # broken bytes can raise anything
            reason = first_line(error).partition(". ")[0]
            raise CheckpointError(f"{path}: unreadable as weights only: {reason}") from None
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
    """Whether all values are finite. ``aminmax`` returns any NaN, and is twenty times as fast as ``isfinite``."""
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))
