"""The sidecar: a JSON file beside an output that describes it. It is written last: its output is complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_most.errors import DataError
from megatron_most.files import read_json, write_json

FORMAT_VERSION = 1

_RENAMED = {"licence": "license", "licences": "licenses", "tokenised": "tokenized"}
"""Keys of version 0.1 and what they are called now."""


def write_sidecar(path: str | Path, content: dict[str, Any]) -> None:
    """Write a sidecar, completely or not at all."""
    write_json(path, {"format": FORMAT_VERSION, **content})


def read_sidecar(path: str | Path, what: str) -> dict[str, Any]:
    """Read a sidecar; :class:`DataError` that names ``what`` if it is missing or damaged."""
    if not Path(path).is_file():
        raise DataError(f"{what}: {path} is missing (not built, or not finished)")
    content = read_json(path, DataError)
    if content.get("format") != FORMAT_VERSION:
        raise DataError(f"{what}: {path} is not of format {FORMAT_VERSION}")
    return content


def with_current_keys(sidecar: dict[str, Any]) -> dict[str, Any]:
    """A sidecar of any version with today's keys, at every depth."""
    renamed = {}
    for key, value in sidecar.items():
        name = _RENAMED.get(key, key)
        # Keys below ``licenses`` are names of licenses, or paths: not ours to rename.
        is_section = isinstance(value, dict) and name != "licenses"
        renamed[name] = with_current_keys(value) if is_section else value
    return renamed
