"""YAML from others: refused before it is built if it is too large, too deep, or grows by aliases or interpolations."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from megatron_most.errors import first_line, shown

MAX_BYTES = 1 << 20
"""Bytes of a YAML file."""

MAX_DEPTH = 64
"""Levels of lists and mappings inside one another, or of interpolations that lead to others; the parsers recurse."""

MAX_NODES = 100_000
"""Values, with those that aliases and interpolations repeat."""

MAX_INTERPOLATIONS = 1000
"""``${...}`` in a file; OmegaConf parses each one as a language."""

MAX_TEXT = 1 << 20
"""Letters of all texts that hold interpolations, after these have been replaced."""

INTERPOLATION = re.compile(r"\$\{\s*(\.*)([\w.\[\]-]+)\s*\}")
"""``${section.key}``; each leading dot of ``${.key}`` goes up one level."""

_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env:\s*(\w+)\s*(,[^${}]*)?\}")
"""``${oc.env:NAME,default}``, the one function of OmegaConf that may be called."""

_LONGEST_NUMBER = 1000
_NUMBER = re.compile(r"[-+0-9_.:xobeEa-fA-F]+")


def load_yaml(text: str, build: Callable[[str], Any] = yaml.safe_load) -> Any:
    """Build ``text`` if :func:`check_yaml` lets it.

    Raises:
        ValueError: it is no YAML, or could take unbounded time or memory; the message is one line, with the place.
    """
    try:
        check_yaml(text)
        return build(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ValueError(f"{error.problem or first_line(error)}{where}") from None
    except Exception as error:
        is_of_a_tag = type(error) in (AttributeError, IndexError, KeyError, TypeError)  # !!bool x, !!timestamp x
        raise ValueError("a value does not fit its tag" if is_of_a_tag else first_line(error)) from None


def check_yaml(text: str) -> None:
    """Raise :class:`ValueError` or :class:`yaml.YAMLError` if building ``text`` could take unbounded time or memory.

    Only the events of the parser are read: nothing is built.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
    total = interpolations = 0
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and the total before it
    sizes: dict[str, int] = {}  # nodes below each complete anchor
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        assert event.start_mark is not None, "the parser marks every event"
        line = event.start_mark.line + 1
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = total - before
        elif isinstance(event, yaml.AliasEvent):
            assert event.anchor is not None, "an alias has a name"
            if any(anchor == event.anchor for anchor, _ in open_nodes):
                raise ValueError(f"*{event.anchor} in line {line} stands inside what it repeats")
            total += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.NodeEvent):
            total += 1
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((event.anchor, total - 1))
            elif event.anchor is not None:
                sizes[event.anchor] = 1
            if isinstance(event, yaml.ScalarEvent):
                interpolations += _check_scalar(event.value, line)
        if len(open_nodes) > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels in line {line}")
        if total > MAX_NODES:
            raise ValueError(f"more than {MAX_NODES:,} values in line {line}, repeated ones included")
        if interpolations > MAX_INTERPOLATIONS:
            raise ValueError(f"more than {MAX_INTERPOLATIONS:,} interpolations in line {line}")


def _check_scalar(value: str, line: int) -> int:
    """The number of interpolations in a scalar."""
    # Base 60 (1:30:00) and long decimals are read in quadratic time.
    if len(value) > _LONGEST_NUMBER and _NUMBER.fullmatch(value):
        raise ValueError(f"a number of {len(value):,} digits in line {line}")
    count = value.count("${")
    if count > MAX_INTERPOLATIONS:
        return count
    if count != len(INTERPOLATION.findall(value)) + len(_ENVIRONMENT.findall(value)):
        raise ValueError(f"{shown(value, 60)} in line {line}: an interpolation must be ${{section.key}}")
    return count


def check_expansion(content: Any) -> None:
    """Raise :class:`ValueError` if replacing the interpolations of ``content`` would make too much of it.

    ``content`` is plain data of YAML that :func:`check_yaml` let through. OmegaConf follows each interpolation anew, so
    what it costs is the size of what comes out.
    """
    measure = _Expansion(content)
    for path, value in measure.texts(content, ()):
        measure.add(path, value)


class _Expansion:
    """Values and letters behind each place of ``content``, interpolations followed."""

    def __init__(self, content: Any) -> None:
        self._content = content
        self._known: dict[tuple[str, ...], tuple[int, int]] = {}
        self._values = self._letters = 0

    def texts(self, value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
        """Every text below ``path`` that holds an interpolation."""
        if isinstance(value, (dict, list)):
            for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
                yield from self.texts(entry, (*path, str(key)))
        elif isinstance(value, str) and "${" in value:
            yield path, value

    def add(self, path: tuple[str, ...], text: str) -> None:
        values, letters = self._size(text, path, ())
        self._values, self._letters = self._values + values, self._letters + letters
        if self._values > MAX_NODES or self._letters > MAX_TEXT:
            most = f"{MAX_NODES:,} values or {MAX_TEXT >> 20} MiB of text"
            raise ValueError(f"{'.'.join(path)}={shown(text, 60)}: interpolations make more than {most}")

    def _size(self, value: Any, path: tuple[str, ...], within: tuple[tuple[str, ...], ...]) -> tuple[int, int]:
        if isinstance(value, (dict, list)):
            entries = value.items() if isinstance(value, dict) else enumerate(value)
            sizes = [self._size(entry, (*path, str(key)), within) for key, entry in entries]
            return 1 + sum(size for size, _ in sizes), sum(size for _, size in sizes)
        if not isinstance(value, str) or "${" not in value:
            return 1, len(value) if isinstance(value, str) else 1
        if path in self._known:
            return self._known[path]
        if path in within:
            raise ValueError(f"Recursive interpolation: {' -> '.join('.'.join(one) for one in (*within, path))}")
        if len(within) == MAX_DEPTH:
            raise ValueError(f"{'.'.join(path)}: more than {MAX_DEPTH} interpolations lead to one another")
        values, letters = 1, len(value)
        for dots, name in INTERPOLATION.findall(value):
            parts = tuple(part for part in re.split(r"[.\[\]]+", name) if part)
            target = (*path[: -len(dots)], *parts) if dots else parts
            more, longer = self._size(self._at(target, path), target, (*within, path))
            values, letters = values + more, letters + longer
            if max(values, letters) > MAX_TEXT:  # the caller refuses it; go no further
                break
        letters += sum(len(os.environ.get(name, default)) for name, default in _ENVIRONMENT.findall(value))
        self._known[path] = values, letters
        return values, letters

    def _at(self, target: tuple[str, ...], path: tuple[str, ...]) -> Any:
        """What stands at ``target``; None for nothing, which OmegaConf reports."""
        value = self._content
        for part in target:
            if isinstance(value, str) and "${" in value:
                raise ValueError(f"{'.'.join(path)}: ${{{'.'.join(target)}}} leads through another interpolation")
            if isinstance(value, list) and part.isdecimal() and len(part) < 9 and int(part) < len(value):
                value = value[int(part)]
            else:
                value = value.get(part) if isinstance(value, dict) else None
        return value
