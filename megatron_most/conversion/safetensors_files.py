"""Writes safetensors files one tensor at a time; the library needs all tensors in memory.

The format: eight bytes with the length of the header (little endian), the header as JSON (name -> dtype, shape and
offsets into what follows), and the tensors' bytes one after another.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_most.checkpointing.region_writer import WRITTEN_AT_ONCE
from megatron_most.checkpointing.regions import TensorForm
from megatron_most.conversion.hugging_face import DTYPES
from megatron_most.errors import ConfigError

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def size_of(form: TensorForm) -> int:
    return torch.Size(form.shape).numel() * form.dtype.itemsize


def parse_size(text: str) -> int:
    """The bytes that ``5GB`` or ``500MB`` stands for. Raises :class:`ConfigError` for other text."""
    number, unit = text[:-2], text[-2:].upper()
    if unit not in _UNITS or not number.strip().isdecimal() or int(number) == 0:
        raise ConfigError(f"--max-shard-size={text}: must be a whole number and one of {', '.join(_UNITS)}")
    return int(number) * _UNITS[unit]


def plan_shards(forms: Mapping[str, TensorForm], stem: str, max_size: int) -> dict[str, list[str]]:
    """File name -> its tensors, in order. A file exceeds ``max_size`` bytes only if it holds a single tensor."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, form in forms.items():
        if shards[-1] and size + size_of(form) > max_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += size_of(form)
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {
        f"{stem}-{place:05d}-of-{len(shards):05d}.safetensors": names for place, names in enumerate(shards, start=1)
    }


def index_of(shards: Mapping[str, Sequence[str]], forms: Mapping[str, TensorForm]) -> dict[str, Any] | None:
    """The content of the index of several files; None for a single file, which needs none."""
    if len(shards) == 1:
        return None
    weight_map = {name: file for file, names in shards.items() for name in names}
    total = sum(size_of(form) for form in forms.values())
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def write_file(
    path: Path, forms: Mapping[str, TensorForm], produce: Callable[[str], torch.Tensor], metadata: dict[str, str]
) -> None:
    """Write the tensors of ``forms`` in order. ``produce`` makes each one just before it is written."""
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, form in forms.items():
        end = offset + size_of(form)
        header[name] = {"dtype": _NAMES[form.dtype], "shape": list(form.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, form in forms.items():
            tensor = produce(name)
            if tuple(tensor.shape) != form.shape or tensor.dtype != form.dtype:
                raise RuntimeError(f"{name}: made {tuple(tensor.shape)} {tensor.dtype} for {form}")
            content = memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())
            for start in range(0, len(content), WRITTEN_AT_ONCE):
                stream.write(content[start : start + WRITTEN_AT_ONCE])
        stream.flush()
        os.fsync(stream.fileno())
