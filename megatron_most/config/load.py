"""YAML + dotted overrides -> :class:`RunConfig`, with one-line errors.

OmegaConf merges, interpolates and converts; the shape of what goes in is checked here first, because only here the
full path of a wrong key or value is known, inside lists too.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_most.config.renamed import RENAMED, with_new_names
from megatron_most.config.run import RunConfig
from megatron_most.errors import ConfigError, first_line

CONFIG = "config.yaml"
"""The file in which a run, an import or a sweep records its whole configuration."""

_SCALARS: dict[type, tuple[str, tuple[type, ...]]] = {
    bool: ("true or false", (bool,)),
    int: ("an integer", (int,)),
    float: ("a number", (int, float)),
    str: ("text", (str, int, float)),
}
"""Type of a field: how an error calls it, and what YAML may hold for it (a path may look like a number)."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply ``section.key=value`` overrides and check everything.

    An entry of a list is named by its index: ``model.moe.groups.0.size=8``. A file named ``config.yaml`` may have been
    written by an earlier version: its keys may have their old names.

    Raises:
        ConfigError: unreadable file, unknown key (with the nearest valid name), a key's old name (with the new one),
            wrong type, or a broken rule.
    """
    values = read_yaml(path)
    if Path(path).name == CONFIG:
        values = with_new_names(values)
    return build_config(str(path), values, overrides)


def read_yaml(path: str | Path) -> dict[str, typing.Any]:
    """Read a YAML mapping; interpolations (``${section.key}``) stay as they are.

    Raises:
        ConfigError: the file is missing, is not YAML (with the place), names a key twice, or holds no mapping.
    """
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (yaml.YAMLError, OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: not readable as YAML: {_one_line(error)}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold a mapping of keys to values")
    return content


def build_config(source: str, values: DictConfig | dict, overrides: Sequence[str] = ()) -> RunConfig:
    """Turn ``values`` and dotted overrides into a checked :class:`RunConfig`; ``source`` names them in errors."""
    plain = OmegaConf.to_container(values) if isinstance(values, DictConfig) else copy.deepcopy(values)
    section = plain.get("precision")
    if isinstance(section, dict) and "fp8" in section:
        section["fp8"] = _off(section["fp8"])
    check_shape(plain, RunConfig, "", source)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), plain)
        for override in overrides:
            _apply_override(merged, override)
        OmegaConf.resolve(merged)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"{source}: {', '.join(missing)}: a value is required")
        return typing.cast(RunConfig, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        where = f"{source}: {error.full_key}" if error.full_key else source
        raise ConfigError(f"{where}: {_one_line(error)}") from None


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that :func:`load_config` reads back to an equal config."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _apply_override(config: DictConfig, override: str) -> None:
    source = f"override {override!r}"
    key, equals, text = override.partition("=")
    if not key or not equals:
        raise ConfigError(f"{source}: must have the form key=value")
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"] if text else None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{source}: the value is not readable as YAML: {_one_line(error)}") from None

    hint: typing.Any = RunConfig
    path = ""
    for part in key.split("."):
        if dataclasses.is_dataclass(hint):
            hint = _field_types(hint, part, path, source)[part]
            path = _join(path, part)
            if dataclasses.is_dataclass(hint) and OmegaConf.select(config, path) is None:
                OmegaConf.update(config, path, OmegaConf.structured(hint))  # a required section the file left out
        elif typing.get_origin(hint) is list:
            entries = OmegaConf.select(config, path)
            if not part.isdecimal() or int(part) >= len(entries):
                raise ConfigError(f"{source}: {path} has no entry {part!r}; it holds {len(entries)}, counted from 0")
            hint = typing.get_args(hint)[0]
            path = _join(path, int(part))
        else:
            raise ConfigError(f"{source}: {path} is a single value and has no {part!r}")
    if path == "precision.fp8":
        value = _off(value)
    check_shape(value, hint, path, source)
    OmegaConf.update(config, path, value, merge=True)


def check_shape(value: typing.Any, hint: typing.Any, path: str, source: str) -> None:
    """Raise :class:`ConfigError` unless ``value``, plain data from YAML, has the keys and types of ``hint``.

    Args:
        hint: a dataclass, a list of something, an optional or a scalar type.
        path: dotted name of ``value`` inside the file, empty for the whole.
        source: the file, for errors.
    """
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None:
            return
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if isinstance(value, str) and (value == "???" or "${" in value):
        return  # OmegaConf's marks for a missing value and for an interpolation, which it resolves and checks

    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{source}: {path}={value!r}: must be a section (key: value), not a single value or list")
        for key, entry in value.items():
            check_shape(entry, _field_types(hint, str(key), path, source)[key], _join(path, key), source)
    elif typing.get_origin(hint) is list:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ConfigError(f"{source}: {path}={value!r}: must be a list")
        for index, entry in enumerate(value):
            check_shape(entry, typing.get_args(hint)[0], _join(path, index), source)
    else:
        name, accepted = _SCALARS[hint]
        if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
            raise ConfigError(f"{source}: {path}={value!r}: must be {name}")


def _off(value: typing.Any) -> typing.Any:
    """The word that YAML reads as false."""
    return "off" if value is False else value


def _field_types(section: type, key: str, path: str, source: str) -> dict[str, typing.Any]:
    """Types of a section's fields, of which ``key`` must be one."""
    hints = typing.get_type_hints(section)
    valid = [field.name for field in dataclasses.fields(section)]
    if key not in valid:
        full = _join(path, key)
        if new := RENAMED.get(re.sub(r"\[\d+\]", "[]", full)):
            raise ConfigError(f"{source}: {full}: is now {_join(path, new.rpartition('.')[2])}")
        near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(valid)}"
        raise ConfigError(f"{source}: {full}: unknown key; {hint}")
    return hints


def _join(path: str, part: str | int) -> str:
    if isinstance(part, int):
        return f"{path}[{part}]"
    return f"{path}.{part}" if path else part


def _one_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"{error.problem} (line {mark.line + 1}, column {mark.column + 1})"
    return first_line(error)
