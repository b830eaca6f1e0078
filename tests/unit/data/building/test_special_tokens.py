"""The table of special tokens: every marker is a single id, and no text encodes to it."""

import dataclasses
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from megatron_most.data.building.special_tokens import ROLE_MARKERS, special_tokens
from megatron_most.errors import ConfigError
from megatron_most.text import load_tokenizer
from megatron_most.vocab import ModalityRange, VocabLayout
from tests.unit.data.tiny import LetterTokenizer, layout

SENTENCES = ["the red fox sees two small birds", "a dog and a cat", "<|user|> says <｜User｜>"] * 20


def hugging_face(folder: Path, *markers: str) -> Path:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        special_tokens=["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", *markers],
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def sentence_piece(folder: Path, *markers: str) -> Path:
    (folder / "text").write_text("\n".join(SENTENCES))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=330,
        hard_vocab_limit=False,
        byte_fallback=True,
        model_type="bpe",
        control_symbols=list(markers),
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.mark.parametrize("make", [hugging_face, sentence_piece])
@pytest.mark.parametrize(
    "markers", [(), ("<|system|>", "<|user|>", "<|assistant|>"), ("<｜User｜>", "<｜Assistant｜>")]
)
def test_every_marker_is_a_single_id_that_no_text_becomes(tmp_path, make, markers):
    tokenizer = load_tokenizer(make(tmp_path, *markers))
    vocab = VocabLayout(tokenizer.vocab_size + 3, 4, 10)
    table = special_tokens(vocab, tokenizer, roles=True)
    assert len(set(table.values())) == len(table) == 8
    for role, names in ROLE_MARKERS.items():
        own = [tokenizer.special_id(name) for name in names if name in markers]
        assert [table[role]] == own or (not own and tokenizer.vocab_size <= table[role] < vocab.text_vocab_size)
    written = [*SENTENCES, *(name for names in ROLE_MARKERS.values() for name in names)]
    made = {token for text in written for token in tokenizer.encode(text)}
    assert not made & set(table.values())
    assert all(tokenizer.special_id(name) is None for name in ("the", "▁the", "<|nothing|>", ""))


def test_a_tokenizer_without_markers_needs_room_for_them():
    with pytest.raises(ConfigError, match="special token system: .* set text_vocab_size to at least 33"):
        special_tokens(VocabLayout(30, 3, 50), LetterTokenizer(), roles=True)
    assert "user" not in special_tokens(VocabLayout(30, 3, 50), LetterTokenizer())


def test_markers_of_another_modality_and_ids_met_twice_are_refused():
    taken = dataclasses.replace(layout(), further_modalities=[ModalityRange("image", 38, 40)])
    with pytest.raises(ConfigError, match="special token system: id 39 is image, must be text"):
        special_tokens(taken, LetterTokenizer(), roles=True)
    tokenizer = LetterTokenizer()
    tokenizer.special_id = lambda name: 5
    with pytest.raises(ConfigError, match="special token user: id 5 is already that of system"):
        special_tokens(layout(), tokenizer, roles=True)
