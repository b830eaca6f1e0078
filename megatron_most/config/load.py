"""YAML + dotted overrides -> :class:`RunConfig`, with one-line errors.

OmegaConf merges, interpolates and converts. Keys and types are checked before that, because only then the full path of
a wrong key or value is known, inside lists too.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import io
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_most.config.renamed import RENAMED, with_new_names
from megatron_most.config.run import RunConfig
from megatron_most.errors import ConfigError, first_line, shown
from megatron_most.files import read_text
from megatron_most.keys import LARGEST_INTEGER
from megatron_most.yaml_text import INTERPOLATION, check_expansion, load_yaml

CONFIG = "config.yaml"
"""The file in which a run, an import or a sweep records its whole configuration."""

_RECORDED = frozenset(field.name for field in dataclasses.fields(RunConfig)) - {"precision"}
"""Top-level keys of every recorded configuration; the first versions had no ``precision``."""

_SCALARS: dict[type, tuple[str, tuple[type, ...]]] = {
    bool: ("true or false", (bool,)),
    int: ("an integer", (int,)),
    float: ("a number", (int, float)),
    str: ("text", (str, int, float)),
}
"""Type of a field: its name in an error, and the types that YAML may hold for it (a path may look like a number)."""

CONFIG_DIR = "${config_dir}"
"""In a configuration file: the folder of that file. Other relative paths start from the working directory."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply ``section.key=value`` overrides and check everything.

    :data:`CONFIG_DIR` in a value stands for the file's folder. Paths are relative to the working directory otherwise.

    An entry of a list is named by its index: ``model.moe.groups.0.size=8``. The ``config.yaml`` that a run, an import
    or a sweep of an earlier version recorded is read with its old key names.

    Raises:
        ConfigError: unreadable file, unknown key (with the nearest valid name), a key's old name (with the new one),
            wrong type, or a broken rule.
    """
    values = read_config_file(path)
    if Path(path).name == CONFIG and values.keys() >= _RECORDED:  # a hand-written file leaves out what has a default
        values = with_new_names(values)
    return build_config(str(path), values, overrides)


def read_config_file(path: str | Path) -> dict[str, Any]:
    """:func:`read_yaml`, with :data:`CONFIG_DIR` replaced."""
    folder = str(Path(path).parent)

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replaced(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [replaced(entry) for entry in value]
        return value.replace(CONFIG_DIR, folder) if isinstance(value, str) else value

    return {key: replaced(value) for key, value in read_yaml(path).items()}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping; interpolations (``${section.key}``) are not resolved.

    Raises:
        ConfigError: the file is missing, is not YAML (with the place), is too large or too deep, names a key twice, or
            holds no mapping.
    """
    try:
        content = load_yaml(read_text(path), lambda text: OmegaConf.to_container(OmegaConf.load(io.StringIO(text))))
    except ValueError as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold a mapping of keys to values")
    return content


def build_config(source: str, values: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Turn nested ``values`` and dotted overrides into a checked :class:`RunConfig`; errors name ``source``."""
    plain = copy.deepcopy(dict(values))
    section = plain.get("precision")
    if isinstance(section, dict) and "fp8" in section:
        section["fp8"] = _off(section["fp8"])
    check_shape(plain, RunConfig, "", source)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), plain)
        assert isinstance(merged, DictConfig)
        _check_expansion(source, merged)
        for override in overrides:
            _apply_override(merged, override)
            if "${" in override:
                _check_expansion(f"override {shown(override)}", merged)
        OmegaConf.resolve(merged)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"{source}: {', '.join(missing)}: a value is required")
        check_shape(OmegaConf.to_container(merged), RunConfig, "", source)  # what interpolations became
        return typing.cast(RunConfig, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        where = f"{source}: {error.full_key}" if error.full_key else source
        raise ConfigError(f"{where}: {first_line(error)}") from None


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that :func:`load_config` reads back to an equal config."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _check_expansion(source: str, config: DictConfig) -> None:
    """Raise :class:`ConfigError` before OmegaConf follows interpolations that lead in a circle or grow without end."""
    try:
        check_expansion(OmegaConf.to_container(config, resolve=False))
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None


def _apply_override(config: DictConfig, override: str) -> None:
    source = f"override {shown(override)}"
    key, equals, text = override.partition("=")
    if not key or not equals:
        raise ConfigError(f"{source}: must have the form key=value")
    try:
        parsed = load_yaml(text, lambda text: OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"])))
    except ValueError as error:
        raise ConfigError(f"{source}: the value is not readable as YAML: {error}") from None
    value = parsed["value"] if text else None

    hint: Any = RunConfig
    path, most = "", LARGEST_INTEGER
    for part in key.split("."):
        if dataclasses.is_dataclass(hint):
            section, hint = hint, _field_types(hint, part, path, source)[part]
            most = _most(section, part)
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
    check_shape(value, hint, path, source, most)
    OmegaConf.update(config, path, value, merge=True)


def check_shape(value: Any, hint: Any, path: str, source: str, most: int = LARGEST_INTEGER) -> None:
    """Raise :class:`ConfigError` unless ``value``, plain data from YAML, has the keys and types of ``hint``.

    Numbers must be finite, integers within their key's range, and texts what a file name can hold.

    Args:
        hint: a dataclass, a list of something, an optional or a scalar type.
        path: dotted name of ``value`` inside the file, empty for the whole.
        source: the file, for errors.
        most: the largest absolute value of an integer.
    """
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None:
            return
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if isinstance(value, str) and (value == "???" or "${" in value):
        # OmegaConf's marks of a missing value and of an interpolation, which it resolves and checks.
        _check_interpolated_names(value, path, source)
        return

    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            rule = "must be a section (key: value), not a single value or list"
            raise ConfigError(f"{source}: {path}={shown(value)}: {rule}")
        for key, entry in value.items():
            types_of = _field_types(hint, str(key), path, source)
            check_shape(entry, types_of[key], _join(path, key), source, _most(hint, key))
    elif typing.get_origin(hint) is list:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ConfigError(f"{source}: {path}={shown(value)}: must be a list")
        for index, entry in enumerate(value):
            check_shape(entry, typing.get_args(hint)[0], _join(path, index), source, most)
    else:
        name, accepted = _SCALARS[hint]
        if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
            raise ConfigError(f"{source}: {path}={shown(value)}: must be {name}")
        if rule := _broken_range(value, hint, most):
            raise ConfigError(f"{source}: {path}={shown(value)}: {rule}")


def _broken_range(value: Any, hint: type, most: int) -> str:
    """The rule that a scalar of the right type breaks; empty if none."""
    if hint is int and not -most <= value <= most:
        return f"must be at most {most:,}" if value > 0 else f"must be at least -{most:,}"
    # The comparison fails for NaN, and takes an integer of any size.
    if hint is float and not abs(value) <= sys.float_info.max:
        return "must be a finite number"
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value)):
        return "must hold no NUL and no half of a surrogate pair"
    return ""


def _most(section: Any, key: str) -> int:
    field = next(field for field in dataclasses.fields(section) if field.name == key)
    return field.metadata.get("most", LARGEST_INTEGER)


def _check_interpolated_names(value: str, path: str, source: str) -> None:
    """Answer a key's old name in an interpolation with the new one; OmegaConf only says that the key is not there."""
    for dots, name in INTERPOLATION.findall(value):
        # An index is an entry of its own in OmegaConf's paths: the dots of ${..lr} in a.b[0] lead to a.
        above = re.sub(r"\[(\d+)\]", r".\1", path).split(".")[: -len(dots)] if dots else []
        full = re.sub(r"\[(\d+)\]|\.(\d+)\b", r"[\1\2]", ".".join([*above, name]))
        if new := _new_name(full):
            raise ConfigError(f"{source}: {path}={value!r}: {full} is now {new}")


def _new_name(path: str) -> str | None:
    """The full path of today for a key's old path; None for any other key."""
    new = RENAMED.get(re.sub(r"\[\d+\]", "[]", path))
    return None if new is None else _join(path.rpartition(".")[0], new.rpartition(".")[2])


def _off(value: Any) -> Any:
    """The word that YAML reads as false."""
    return "off" if value is False else value


def _field_types(section: Any, key: str, path: str, source: str) -> dict[str, Any]:
    """Types of a section's fields, of which ``key`` must be one."""
    hints = typing.get_type_hints(section)
    valid = [field.name for field in dataclasses.fields(section)]
    if key not in valid:
        full = _join(path, key)
        if new := _new_name(full):
            raise ConfigError(f"{source}: {full}: is now {new}")
        near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(valid)}"
        raise ConfigError(f"{source}: {full}: unknown key; {hint}")
    return hints


def _join(path: str, part: str | int) -> str:
    if isinstance(part, int):
        return f"{path}[{part}]"
    return f"{path}.{part}" if path else part
