"""YAML + dotted overrides -> :class:`RunConfig`, with one-line errors; OmegaConf does the merging and typing."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Sequence
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from megatron_most.config.run import RunConfig
from megatron_most.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply ``section.key=value`` overrides and check everything.

    Raises:
        ConfigError: unreadable file, unknown key (with the nearest valid name), wrong type, or a broken rule.
    """
    path = Path(path)
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: must hold a mapping of config sections")
    return build_config(str(path), loaded, overrides)


def build_config(source: str, values: DictConfig | dict, overrides: Sequence[str] = ()) -> RunConfig:
    """Turn ``values`` and dotted overrides into a checked :class:`RunConfig`; ``source`` names them in errors."""
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise ConfigError(f"override {override!r}: must have the form key=value")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), values)
        for override in overrides:
            key, value = override.split("=", 1)
            OmegaConf.update(merged, key, yaml.safe_load(value) if value else None, merge=True)
        OmegaConf.resolve(merged)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"{source}: {missing[0]}: a value is required")
        return typing.cast(RunConfig, OmegaConf.to_object(merged))
    except (ConfigAttributeError, ConfigKeyError) as error:
        raise ConfigError(f"{source}: {_unknown_key(error)}") from None
    except ValidationError as error:
        raise ConfigError(f"{source}: {error.full_key}: {str(error).splitlines()[0]}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {str(error).splitlines()[0]}") from None


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that :func:`load_config` reads back to an equal config."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _unknown_key(error: OmegaConfBaseException) -> str:
    key = error.full_key or str(error.key)
    valid = [field.name for field in dataclasses.fields(error.object_type)] if error.object_type else []
    near = difflib.get_close_matches(key.rsplit(".", 1)[-1], valid, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(valid)}"
    return f"{key}: unknown key; {hint}"
