"""The tokenizer is imported and exported with the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_most.checkpointing import read_metadata
from megatron_most.conversion import export_model, import_model
from megatron_most.errors import ConfigError
from megatron_most.text import load_tokenizer, train_sentencepiece
from tests.unit.conversion.models import deepseek
from tests.unit.conversion.test_round_trips import options


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "hf"
    deepseek(folder, vocab_size=400)
    train_sentencepiece(["the old brown dog sees seven gray cats"] * 4, folder / "tokenizer.model", 300)
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    return folder


def test_its_files_and_its_fingerprint_come_along_and_leave_again(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    checkpoint = import_model(folder, tmp_path / "native", options("expand"))
    metadata = read_metadata(checkpoint)
    assert metadata.tokenizer.fingerprint == tokenizer.fingerprint
    assert load_tokenizer(metadata.config["tokenizer"]).fingerprint == tokenizer.fingerprint
    export_model(checkpoint, tmp_path / "back", "deepseek-v2")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (tokenizer.bos_id, tokenizer.eos_id)


def test_one_with_more_ids_than_the_model_has_for_text_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"vocab.text_vocab_size=100: the tokenizer of .*hf has \d+ ids"):
        import_model(folder, tmp_path / "native", options("expand", "vocab.text_vocab_size=100"))
    assert not (tmp_path / "native").exists()


def test_ids_that_the_layout_leaves_out_are_listed(folder, tmp_path):
    size = load_tokenizer(folder).vocab_size
    checkpoint = import_model(folder, tmp_path / "native", options("expand", f"vocab.text_vocab_size={size}"))
    left = json.loads((checkpoint / "conversion.json").read_text())["left_aside"]
    assert set(left) == {f"model.embed_tokens.weight[{size}:400]", f"lm_head.weight[{size}:400]"}
