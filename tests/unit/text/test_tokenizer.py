"""Text tokenizers: nothing is lost, special ids are single and cannot be spelled."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_most.errors import ConfigError, DataError
from megatron_most.text import load_tokenizer, train_sentencepiece

SENTENCES = ["the red fox sees two small birds", "the green dog finds three heavy chairs", "Say: the fox"] * 5
BOS, EOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"


@pytest.fixture(scope="module")
def sentencepiece_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    train_sentencepiece(SENTENCES, path, 480)
    return path


def write_hugging_face(folder: Path, bos: object = BOS, eos: object = EOS) -> Path:
    """A byte-level tokenizer with DeepSeek's full-width markers, as its ``tokenizer.json`` has them."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, show_progress=False, special_tokens=[BOS, EOS]
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos, "eos_token": eos, "pad_token": None}))
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def hugging_face_path(tmp_path_factory) -> Path:
    return write_hugging_face(tmp_path_factory.mktemp("hugging_face"))


@pytest.fixture(params=["sentencepiece_path", "hugging_face_path"])
def tokenizer(request):
    return load_tokenizer(request.getfixturevalue(request.param))


def test_words_of_a_tiny_language_are_single_pieces(sentencepiece_path):
    tokenizer = load_tokenizer(sentencepiece_path)
    assert [tokenizer.decode([piece]) for piece in tokenizer.encode("the red dog sees three birds")] == [
        "the", "red", "dog", "sees", "three", "birds",
    ]  # fmt: skip


def test_training_is_deterministic(sentencepiece_path, tmp_path):
    again = train_sentencepiece(SENTENCES, tmp_path / "again.model", 480)
    assert (tmp_path / "again.model").read_bytes() == sentencepiece_path.read_bytes()
    assert again.fingerprint == load_tokenizer(sentencepiece_path).fingerprint


@settings(deadline=None, max_examples=60)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581\0"), max_size=30))
def test_sentencepiece_loses_nothing(sentencepiece_path, text):
    tokenizer = load_tokenizer(sentencepiece_path)
    text = text.strip()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_ids_are_inside_the_vocabulary_and_differ(tokenizer):
    assert tokenizer.bos_id != tokenizer.eos_id
    special = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    assert all(0 <= token_id < tokenizer.vocab_size for token_id in special)


def test_encoding_adds_no_special_ids_and_decoding_drops_them(tokenizer):
    ids = tokenizer.encode("the fox")
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == "the fox"


@pytest.mark.parametrize("marker", [BOS, EOS, "<s>", "</s>"])
def test_text_that_spells_a_special_token_stays_text(tokenizer, marker):
    ids = tokenizer.encode(f"fox {marker} dog")
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(ids)
    spelled = tokenizer.decode(ids).replace("\u2581", " ")  # SentencePiece writes a space that way
    assert spelled == f"fox {marker} dog".replace("\u2581", " ")


@pytest.mark.parametrize("bad", [-1, 10**6])
def test_decoding_refuses_ids_outside_the_vocabulary(tokenizer, bad):
    with pytest.raises(DataError, match=f"id {bad} at position 1"):
        tokenizer.decode([tokenizer.encode("fox")[0], bad])


def test_full_width_markers_are_single_ids(hugging_face_path):
    tokenizer = load_tokenizer(hugging_face_path)
    raw = tokenizers.Tokenizer.from_file(str(hugging_face_path))
    assert tokenizer.bos_id == raw.token_to_id(BOS) and tokenizer.eos_id == raw.token_to_id(EOS)
    assert tokenizer.pad_id == tokenizer.eos_id  # none is set


def test_markers_may_be_objects_and_a_folder_may_be_named(tmp_path):
    write_hugging_face(tmp_path, bos={"content": BOS, "lstrip": False}, eos={"content": EOS})
    assert load_tokenizer(tmp_path).bos_id == load_tokenizer(tmp_path / "tokenizer.json").bos_id


def test_markers_in_another_spelling_are_refused(tmp_path):
    path = write_hugging_face(tmp_path, bos="<|begin_of_sentence|>")
    with pytest.raises(ConfigError, match="bos_token .* is not a single token"):
        load_tokenizer(path)


def test_a_tokenizer_that_does_not_say_its_markers_is_refused(tmp_path):
    path = write_hugging_face(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match="sets bos_token"):
        load_tokenizer(path)


def test_the_fingerprint_depends_on_the_markers(tmp_path):
    path = write_hugging_face(tmp_path)
    before = load_tokenizer(path).fingerprint
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": EOS, "eos_token": BOS}))
    assert load_tokenizer(path).fingerprint != before


@pytest.mark.parametrize("name", ["absent.model", "absent.json"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(ConfigError, match=f"{name}: no such file"):
        load_tokenizer(tmp_path / name)


@pytest.mark.parametrize("name", ["broken.model", "broken.json", "broken.txt"])
def test_a_broken_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x00nonsense")
    with pytest.raises(ConfigError, match=name):
        load_tokenizer(tmp_path / name)


def test_a_vocabulary_too_small_for_the_texts_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(ConfigError, match="vocab_size=200: must be at least"):
        train_sentencepiece(SENTENCES, tmp_path / "small.model", 200)
    assert not list(tmp_path.iterdir())


def test_training_needs_text(tmp_path):
    with pytest.raises(ConfigError, match="no text to train on"):
        train_sentencepiece(["", "  "], tmp_path / "empty.model", 400)
