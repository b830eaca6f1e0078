"""The panel that says which model it is: checkpoint, layout, expert groups, training and the licenses of its data."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_most.checkpointing import resolve
from megatron_most.conversion.model_card import describe, model_tables
from megatron_most.errors import CheckpointError, ConfigError
from megatron_most.files import read_text
from megatron_most.inference import LoadedModel

_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_MOST_BYTES = 1 << 18


def card_of(source: str | Path, model: LoadedModel) -> str:
    """Markdown, without HTML or pictures: an export's card may be a stranger's.

    Args:
        source: the checkpoint, run or export that ``model`` was loaded from.
    """
    source = Path(source)
    if model.metadata is None:
        return "\n".join([f"Export `{source.name}`", "", _exported_card(source, model)])
    checkpoint = resolve(source)
    lines = describe(model.config, model.metadata, checkpoint)
    return harmless("\n".join([f"Checkpoint `{checkpoint.parent.name}/{checkpoint.name}`", "", *lines]))


def _exported_card(folder: Path, model: LoadedModel) -> str:
    try:
        text = read_text(folder / "README.md", CheckpointError, limit=_MOST_BYTES, errors="replace")
    except CheckpointError:
        lines = model_tables(model.config, _codec_name(model))
        text = "\n".join([*lines, "", "It has no model card: its data is unknown."])
    return harmless(_FRONT_MATTER.sub("", text))


def _codec_name(model: LoadedModel) -> str | None:
    try:
        return model.codec.name
    except ConfigError:  # loaded for text alone
        return None


def harmless(text: str) -> str:
    """Markdown that shows tags and pictures as they are written."""
    return text.replace("<", "&lt;").replace("![", "\\![")
