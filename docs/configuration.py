"""Write docs/configuration.md: every configuration key, from the dataclasses that define them.

python docs/configuration.py
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from megatron_most.config import RunConfig
from megatron_most.keys import Key, keys_of

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Configuration

Every key of a training configuration, as `section.key=value` on a command line or as nested YAML. `[]` stands for each
entry of a list; on a command line, give its index (`model.moe.groups.0.size=8`).

Relative paths start from the working directory. In a file, `${config_dir}` stands for the folder of that file.

A key has Megatron's name where Megatron has it, otherwise Hugging Face's or the paper's. The last column is the
Megatron-LM flag; the values a key takes are those named here. A key marked *training only* does not change what given
weights compute, and may differ between a checkpoint and the run that loads it.

Keys that had another name in an earlier version are refused, with the new name in the message. The files that a run, an
import, or a sweep wrote (`config.yaml`, `checkpoint.json`) are still read. `python docs/configuration.py` writes this
page.
"""


def page() -> str:
    parts = [HEAD]
    described: set[type] = set()
    for name, keys in groupby(keys_of(RunConfig), key=lambda found: found.path.rpartition(".")[0]):
        section = _class_of(name)
        if section not in described:
            described.add(section)
            parts.append("\n".join(_section(name, section, list(keys))))
    return "\n".join(parts)


def _class_of(path: str) -> type:
    below = {found.path: found.section for found in keys_of(RunConfig)}
    return below[path.removesuffix("[]")] or RunConfig if path else RunConfig


def _section(name: str, section: type, keys: list[Key]) -> Iterator[str]:
    yield f"## {f'`{name}`' if name else 'Top level'}\n"
    yield inspect.cleandoc(section.__doc__ or "").replace("``", "`") + "\n"
    yield "| key | type | default | meaning | Megatron |\n|---|---|---|---|---|"
    for found in keys:
        notes = found.field.metadata
        meaning = notes["meaning"] + (" *(training only)*" if notes["training_only"] else "")
        flag = f"`{notes['flag']}`" if notes["flag"] else ""
        cells = (f"`{found.field.name}`", _type(found.hint), _default(found), meaning, flag)
        yield f"| {' | '.join(cells)} |"
    yield ""


def _type(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_type(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        inner = _type(typing.get_args(hint)[0])
        return f"list of {inner if inner == 'text' else inner + 's'}"
    if dataclasses.is_dataclass(hint):
        return "section"
    return {bool: "true or false", int: "integer", float: "number", str: "text", type(None): "null"}[hint]


def _default(found: Key) -> str:
    field = found.field
    if field.default is not dataclasses.MISSING:
        text = field.default if isinstance(field.default, str) else yaml.safe_dump(field.default).splitlines()[0]
        return f"`{text}`"
    if field.default_factory is list:
        return "`[]`"
    return "required" if field.default_factory is dataclasses.MISSING else ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
