"""Configuration keys: dataclass fields with their meaning, and a walk over the keys of a configuration."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

REQUIRED = dataclasses.MISSING


LARGEST_INTEGER = 2**31 - 1
"""Limit of an integer key that states no smaller one: libraries below hold seeds, sizes and counts in 32 bits."""


def key(default: Any, meaning: str, flag: str = "", *, training_only: bool = False, most: int = LARGEST_INTEGER) -> Any:
    """A field of a configuration section.

    Args:
        default: the value, a function that makes one (``list``, a section's class), or :data:`REQUIRED`.
        meaning: what the key does, for docs/configuration.md.
        flag: the Megatron-LM command-line flag for the same thing, if there is one.
        training_only: of a key in ``model``: it does not change what given weights compute, so that a checkpoint may
            be loaded with another value.
        most: the largest value of an integer, for what takes memory or time before a library can refuse it.
    """
    metadata = {"meaning": meaning, "flag": flag, "training_only": training_only, "most": most}
    if callable(default) and default is not REQUIRED:
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Key:
    """A key with its dotted path, in which ``[]`` stands for every index of a list.

    ``section`` is the dataclass below the key; None for a key that holds a value or a list of values.
    """

    path: str
    hint: Any
    field: dataclasses.Field
    section: type | None


def keys_of(section: type, path: str = "") -> Iterator[Key]:
    """The keys of a section, followed by those of each section below it."""
    hints = typing.get_type_hints(section)
    below = []
    for field in dataclasses.fields(section):
        hint, name = hints[field.name], f"{path}.{field.name}" if path else field.name
        is_list = typing.get_origin(hint) is list
        inner = typing.get_args(hint)[0] if is_list else hint
        nested = inner if isinstance(inner, type) and dataclasses.is_dataclass(inner) else None
        yield Key(name, hint, field, nested)
        if nested is not None:
            below.append((nested, f"{name}[]" if is_list else name))
    for nested, name in below:
        yield from keys_of(nested, name)


def training_only(section: type) -> frozenset[str]:
    """Paths of the keys marked as training only."""
    return frozenset(found.path for found in keys_of(section) if found.field.metadata.get("training_only"))
