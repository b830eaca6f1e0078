"""The ids that end a text of a model, besides the end of sequence of its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_most.errors import ConfigError, first_line, shown
from megatron_most.files import read_json, read_text
from megatron_most.text.tokenizer import TextTokenizer

GENERATION_CONFIG = "generation_config.json"
"""The file of a Hugging Face model whose ``eos_token_id`` ends generation; an id or a list of ids."""

_END_OF_TURN = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "<|end_of_turn|>",
    "<|endofturn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<end_of_turn>",
)
"""Special tokens with which the chat templates of published models end an answer."""


def stop_ids(path: str | Path, tokenizer: TextTokenizer) -> tuple[int, ...]:
    """The ids that end a text just as the end of sequence of ``tokenizer`` does.

    They are ``eos_token_id`` of a ``generation_config.json`` beside the tokenizer, and the special tokens that end a
    turn in its chat template. Ids that the tokenizer does not have are left out.

    Args:
        path: where ``tokenizer`` was loaded from, a file or a folder.

    Raises:
        ConfigError: one of the files is unreadable, or ``eos_token_id`` is not an id or a list of ids.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    settings, template = folder / GENERATION_CONFIG, _chat_template(folder)
    of_template = (tokenizer.special_id(name) for name in _END_OF_TURN if name in template)
    ids = [*eos_ids(_read_json(settings), str(settings)), *(token for token in of_template if token is not None)]
    known = (token for token in ids if 0 <= token < tokenizer.vocab_size and token != tokenizer.eos_id)
    return tuple(dict.fromkeys(known))


def eos_ids(values: Mapping[str, Any], source: str) -> list[int]:
    """``eos_token_id`` of a ``config.json`` or ``generation_config.json`` as a list, empty if it is not set.

    Raises:
        ConfigError: it is something else; ``source`` is named.
    """
    value = values.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(token) is not int for token in ids):
        raise ConfigError(f"{source}: eos_token_id={shown(value)}: must be an id or a list of ids")
    return ids


def _chat_template(folder: Path) -> str:
    """The source of the chat templates beside a tokenizer, empty if there are none."""
    file = folder / "chat_template.jinja"
    try:
        text = read_text(file) if file.is_file() else ""
    except ValueError as error:
        raise ConfigError(f"{file}: cannot be read: {first_line(error)}") from None
    # One template, or a list of named ones.
    return text + str(_read_json(folder / "tokenizer_config.json").get("chat_template", ""))


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty if there is no such file."""
    return read_json(path) if path.is_file() else {}
