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


@pytest.mark.parametrize("setting", ["truncation", "padding", "both"])
def test_settings_for_somebodys_batches_are_switched_off(tmp_path, setting):
    path = write_hugging_face(tmp_path)
    text = " ".join(["the red fox"] * 20)
    plain = load_tokenizer(path).encode(text), load_tokenizer(path).encode("fox")
    saved = tokenizers.Tokenizer.from_file(str(path))
    if setting != "padding":
        saved.enable_truncation(16)
    if setting != "truncation":
        saved.enable_padding(pad_id=1, pad_token=EOS, length=64)
    saved.save(str(path))
    assert (load_tokenizer(path).encode(text), load_tokenizer(path).encode("fox")) == plain


def byte_level(folder: Path, added: list[tokenizers.AddedToken], split: str | None, **config: str) -> Path:
    """A byte-level BPE tokenizer, as DeepSeek-V2, Llama 3, Qwen and SmolLM have it, with the tokens added behind."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=split is not None))
    steps = [tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)]
    if split is not None:
        steps.insert(0, tokenizers.pre_tokenizers.Split(tokenizers.Regex(split), "isolated"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_tokens(added)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{added[0].content} $A", special_tokens=[(added[0].content, tokenizer.token_to_id(added[0].content))]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def special(*contents: str) -> list[tokenizers.AddedToken]:
    return [tokenizers.AddedToken(content, special=True, normalized=False) for content in contents]


WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LAYOUTS = {
    "deepseek": lambda folder: byte_level(
        folder, [*special(BOS, EOS), tokenizers.AddedToken("<\uff5cfim\u2581hole\uff5c>", special=False)], WORDS,
        bos_token=BOS, eos_token=EOS, pad_token=EOS,
    ),
    "llama": lambda folder: byte_level(
        folder, special("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"), WORDS,
        bos_token="<|begin_of_text|>", eos_token="<|eot_id|>",
    ),
    "qwen": lambda folder: byte_level(
        folder, [*special("<|endoftext|>", "<|im_start|>", "<|im_end|>"), tokenizers.AddedToken("<think>")], WORDS,
        bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>",
    ),
    "smollm": lambda folder: byte_level(
        folder, special("<|endoftext|>", "<|im_start|>", "<|im_end|>"), None,
        bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
    ),
}  # fmt: skip


@pytest.fixture(params=LAYOUTS)
def layout(request, tmp_path) -> Path:
    return LAYOUTS[request.param](tmp_path)


TEXTS = ["the red fox", "  two  spaces", "1234567", "line\n\nbreak ", "na\u00efve \u65e5\u672c \U0001f98a", "<|im_sta"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_published_layout_encodes_as_its_own_library_and_loses_nothing(layout, text):
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(layout)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(layout)
    assert tokenizer.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_id, tokenizer.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)


def test_added_tokens_of_a_published_layout_are_ids_that_only_special_ones_keep_from_text(layout):
    tokenizer, raw = load_tokenizer(layout), tokenizers.Tokenizer.from_file(str(layout / "tokenizer.json"))
    added = raw.get_added_tokens_decoder()
    assert tokenizer.vocab_size == max(added) + 1 == raw.get_vocab_size(with_added_tokens=True)
    for token_id, token in added.items():
        ids = tokenizer.encode(f"fox {token.content} dog")
        assert (token_id in ids) is not token.special
        assert tokenizer.decode(ids) == f"fox {token.content} dog"
        assert tokenizer.special_id(token.content) == (token_id if token.special else None)


def test_a_model_may_have_more_ids_than_its_tokenizer(layout):
    """Published vocabularies are padded to a round size; the tokenizer knows nothing of the ids beyond its own."""
    tokenizer = load_tokenizer(layout)
    with pytest.raises(DataError, match=f"id {tokenizer.vocab_size} at position 1 is outside the tokenizer"):
        tokenizer.decode([tokenizer.bos_id, tokenizer.vocab_size])


def test_bytes_stand_for_characters_that_the_pieces_lack(tmp_path):
    """As in Llama 2's ``tokenizer.json``: pieces with a lower line for the space, and a piece for each byte."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "f", "o", "x"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    model = tokenizers.models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    raw = tokenizers.Tokenizer(model)
    raw.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    raw.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    raw.add_special_tokens(["<unk>", "<s>", "</s>"])
    raw.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("fox\u00e9") == [vocab[piece] for piece in ("f", "o", "x", "<0xC3>", "<0xA9>")]
    for text in ("fox fox", "\u65e5\u672c fox \U0001f98a"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").write_text("[" * 100_000), "not readable as a tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "not readable as a tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff"), "not readable as a tokenizer.json"),
        (lambda folder: _edit(folder, lambda model: model.update(vocab={}, merges=[])), "tokenizer"),
        (lambda folder: _edit(folder, lambda model: model["vocab"].update(a=-1)), "tokenizer"),
        (lambda folder: _edit(folder, lambda model: model["vocab"].update(x=4_000_000_000)), "ids, must have 1 to"),
        (lambda folder: _settings(folder, bos_token=5), "bos_token=5: must be a token"),
        (lambda folder: _settings(folder, bos_token={"content": [1]}), "bos_token=[1]: must be a token"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("[" * 100_000), "not readable as JSON"),
    ],
)
def test_hostile_tokenizers_are_one_line(tmp_path, change, message):
    path = write_hugging_face(tmp_path)
    change(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def _edit(folder: Path, change) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content["model"])
    content["added_tokens"] = [] if not content["model"]["vocab"] else content["added_tokens"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def _settings(folder: Path, **values: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS, "bos_token": BOS, **values}))


@pytest.mark.parametrize("content", [b"", b"x" * 1000, bytes(1000)])
def test_broken_sentencepiece_models_are_one_line(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.model: ") as caught:
        load_tokenizer(tmp_path / "tokenizer.model")
    assert "\n" not in str(caught.value)
