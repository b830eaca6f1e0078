"""Reads fields of ``config.json`` with errors that name them, and translates rotary positions, which formats share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from megatron_most.config import RopeConfig, RunConfig
from megatron_most.errors import CheckpointError

Values = dict[str, Any]


@dataclass
class Config:
    """The values of ``config.json``. Errors name the file and the field.

    Args:
        used: the fields that were asked for; :meth:`refuse_unknown` refuses the others.
        absent: what absent fields mean, unless the caller gives a default.
    """

    values: Values
    source: str
    used: set[str] = field(default_factory=set)
    absent: Values = field(default_factory=dict)

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise CheckpointError(f"{self.source}: {name}={value!r}: must be a whole number, at least 0")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise CheckpointError(f"{self.source}: {name}={value!r}: must be a finite number")
        return float(value)

    def flag(self, name: str, default: bool | None = None) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.source}: {name}={value!r}: must be true or false")
        return value

    def get(self, name: str) -> Any:
        """The value as it is; None if the field is absent."""
        self.used.add(name)
        return self.values.get(name)

    def require(self, name: str, *allowed: object) -> None:
        """Raise unless the field is absent or has one of the ``allowed`` values, those that can be converted."""
        self.used.add(name)
        value = self.values.get(name, allowed[0])
        if value not in allowed:
            text = " or ".join(map(repr, allowed))
            raise CheckpointError(f"{self.source}: {name}={value!r}: only {text} can be converted")

    def refuse_unknown(self, what: str, inert: Iterable[str]) -> None:
        """Raise if a field was not asked for, is not one of ``inert`` and has a value: what it means is unknown."""
        unknown = sorted(self.values.keys() - self.used - set(inert))
        for name in unknown:
            if self.values[name] is not None:
                raise CheckpointError(
                    f"{self.source}: {name}={self.values[name]!r}: is not a known field of {what}; remove it if the"
                    " weights do not depend on it"
                )

    def _value(self, name: str, default: object) -> Any:
        value = self.get(name)
        if value is None:
            value = self.absent.get(name) if default is None else default
        if value is None:
            raise CheckpointError(f"{self.source}: {name} is missing")
        return value


@dataclass(frozen=True)
class Field:
    """A field of ``config.json`` and the key of the ``model`` section that means the same.

    Args:
        name: of the field.
        path: of the key below ``model``, with dots.
        kind: ``int``, ``float`` or ``bool``.
        default: what an absent field means, or a function that tells from the others; None if it must be there.
        nullable: whether null, or an absent field, is a value.
        also: another name of the field, in other versions of transformers.
    """

    name: str
    path: str
    kind: type = int
    default: Any = None
    nullable: bool = False
    also: str | None = None

    def read(self, config: Config) -> Any:
        value, other = config.get(self.name), None if self.also is None else config.get(self.also)
        if value is not None and other is not None and value != other:
            raise CheckpointError(f"{config.source}: {self.name}={value!r}: {self.also}={other!r} contradicts it")
        if value is None and other is None and self.nullable:
            return None
        name = self.also if value is None and self.also is not None and other is not None else self.name
        default = self.default(config) if callable(self.default) else self.default
        readers: dict[type, Callable[..., Any]] = {int: config.integer, float: config.number, bool: config.flag}
        return readers[self.kind](name, default)


def max_positions(config: RunConfig) -> int:
    """The value of ``max_position_embeddings``. Some versions of transformers divide it by the original length and use
    the quotient instead of ``factor``, so the two must agree."""
    rope = config.model.attention.rope
    if rope.rope_type == "rope":
        return config.data.seq_length
    return round(rope.original_max_position_embeddings * rope.rotary_scaling_factor)


def read_rope(config: Config) -> Values:
    """The ``rope`` section, from ``rope_theta`` and ``rope_scaling`` or from ``rope_parameters``, which replaces both.

    Missing fields get the values that transformers gives them.
    """
    scaling, parameters = config.get("rope_scaling"), config.get("rope_parameters")
    joined = scaling or parameters or {}
    if not isinstance(joined, dict):
        raise CheckpointError(f"{config.source}: rope_scaling={joined!r}: must be a JSON object or null")
    rope = Config({**joined}, f"{config.source}: rope_scaling")
    values = _rope_values(config, rope)
    rope.refuse_unknown("rotary positions", ("rope_type", "type"))
    return values


def _rope_values(config: Config, rope: Config) -> Values:
    base = rope.number("rope_theta", config.number("rope_theta"))
    for section in (config, rope):
        section.require("partial_rotary_factor", 1, None)
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    length = config.integer("max_position_embeddings")
    if kind in ("default", None):
        return {"rope_type": "rope", "rotary_base": base}
    if kind not in ("yarn", "llama3"):
        raise CheckpointError(f"{rope.source}: type={kind!r}: only 'default', 'yarn' or 'llama3' can be converted")
    original = config.integer(
        "original_max_position_embeddings", rope.integer("original_max_position_embeddings", length)
    )
    if original == 0:
        raise CheckpointError(f"{rope.source}: original_max_position_embeddings=0: must be at least 1")
    values = {
        "rope_type": kind,
        "rotary_base": base,
        "rotary_scaling_factor": rope.number("factor", length / original if kind == "yarn" else None),
        "original_max_position_embeddings": original,
    }
    if kind == "llama3":
        rope.require("low_freq_factor", 1, 1.0)
        rope.require("high_freq_factor", 4, 4.0)
        return values
    rope.require("attention_factor", None)
    rope.require("truncate", True)
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if bool(mscale) != bool(all_dim):
        raise CheckpointError(
            f"{rope.source}: mscale={mscale!r} and mscale_all_dim={all_dim!r}: must be given both or not at all"
        )
    return {
        **values,
        "beta_fast": rope.number("beta_fast", 32.0),
        "beta_slow": rope.number("beta_slow", 1.0),
        # Without the two fields, the temperature of the YaRN paper.
        "mscale": rope.number("mscale") if mscale else 1.0,
        "mscale_all_dim": rope.number("mscale_all_dim") if all_dim else 0.0,
    }


def write_rope(rope: RopeConfig) -> Values:
    if rope.rope_type == "rope":
        return {"rope_theta": rope.rotary_base, "rope_scaling": None}
    scaling: Values = {
        "type": rope.rope_type,
        "rope_type": rope.rope_type,
        "factor": rope.rotary_scaling_factor,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
    }
    if rope.rope_type == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    else:
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        if rope.mscale_all_dim:
            scaling |= {"mscale": rope.mscale, "mscale_all_dim": rope.mscale_all_dim}
    return {"rope_theta": rope.rotary_base, "rope_scaling": scaling}
