"""Checks shared by the configuration sections; a failure names field, value and rule."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_most.errors import ConfigError, shown


def require(condition: bool, field: str, value: object, rule: str) -> None:
    """Raise :class:`ConfigError` ``field=value: rule`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(f"{field}={shown(value)}: {rule}")


def require_positive(section: str, config: object, fields: Iterable[str]) -> None:
    for field in fields:
        require(getattr(config, field) > 0, f"{section}.{field}", getattr(config, field), "must be greater than 0")


def require_not_negative(section: str, config: object, fields: Iterable[str]) -> None:
    for field in fields:
        require(getattr(config, field) >= 0, f"{section}.{field}", getattr(config, field), "must not be negative")


def require_one_of(field: str, value: str, choices: Iterable[str]) -> None:
    choices = tuple(choices)
    require(value in choices, field, value, f"must be one of {', '.join(choices)}")
