"""YAML from others: refused before it is built if it is too large, too deep, or grows by its aliases."""

from __future__ import annotations

import yaml

MAX_BYTES = 4 << 20
"""Bytes of a YAML file."""

MAX_DEPTH = 64
"""Levels of lists and mappings inside one another; the parsers above recurse."""

MAX_NODES = 100_000
"""Values, with those that aliases repeat."""


def check_yaml(text: str) -> None:
    """Raise :class:`ValueError` or :class:`yaml.YAMLError` if building ``text`` could take unbounded time or memory.

    Only the events of the parser are read: nothing is built.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
    total = 0
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
        if len(open_nodes) > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels in line {line}")
        if total > MAX_NODES:
            raise ValueError(f"more than {MAX_NODES:,} values in line {line}, repeated ones included")
