"""Ids that end a text, from the files of a chat model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from megatron_most.errors import ConfigError
from megatron_most.text import load_tokenizer
from megatron_most.text.stop_ids import stop_ids

TOKENS = ["<unk>", "<s>", "</s>", "<|im_end|>", "<|eot_id|>", "word"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = Tokenizer(models.WordLevel({token: place for place, token in enumerate(TOKENS)}, unk_token="<unk>"))
    tokenizer.add_special_tokens(TOKENS[:5])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return tmp_path


def found(folder: Path) -> tuple[int, ...]:
    tokenizer = load_tokenizer(folder)
    assert stop_ids(folder / "tokenizer.json", tokenizer) == stop_ids(folder, tokenizer)
    return stop_ids(folder, tokenizer)


@pytest.mark.parametrize(
    ("eos", "expected"), [(None, ()), (2, ()), (4, (4,)), ([2, 4, 5, 4], (4, 5)), ([2, 4, 900, -1], (4,)), ([], ())]
)
def test_eos_token_id_of_the_generation_config(folder: Path, eos: object, expected: tuple[int, ...]) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos, "temperature": 0.6}))
    assert found(folder) == expected


def test_without_further_files_there_are_none(folder: Path) -> None:
    assert found(folder) == ()


@pytest.mark.parametrize("template", ["{{ x }}<|im_end|>", [{"name": "default", "template": "{{ x }}<|im_end|>"}]])
def test_end_of_turn_of_the_chat_template(folder: Path, template: object) -> None:
    """Only what the template writes: the vocabulary has other special tokens."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    assert found(folder) == (3,)
    (folder / "chat_template.jinja").write_text("{{ x }}<|eot_id|><|end|>")  # the last is no token here
    assert found(folder) == (3, 4)


@pytest.mark.parametrize("eos", ["</s>", [2, "</s>"], True, 2.5, {"id": 2}])
def test_what_is_not_an_id_is_named(folder: Path, eos: object) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(ConfigError, match="generation_config.json: eos_token_id=.*: must be an id or a list of ids"):
        found(folder)
