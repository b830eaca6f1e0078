"""Building datasets: their documents and provenance, and errors that name the source."""

import json
import multiprocessing
import os
import resource
from pathlib import Path

import numpy as np
import pytest

from megatron_most.data.building import build as module
from megatron_most.data.building.build import Inputs
from megatron_most.data.building.examples import TemplateOptions
from megatron_most.data.building.length_limit import LengthLimit
from megatron_most.data.building.tasks import TEMPLATE_VERSION
from megatron_most.data.building.vocab_options import VocabOptions
from megatron_most.data.storage.codes import CodesDataset
from megatron_most.data.storage.inspection import audio_of
from megatron_most.data.storage.token_dataset import TokenDataset
from megatron_most.errors import ConfigError, DataError
from megatron_most.vocab import ModalityRange, VocabLayout
from tests.unit.data.tiny import (
    CODEBOOK_SIZE,
    CODEBOOKS,
    LAYOUTS,
    LetterTokenizer,
    example_document,
    random_codes,
    write_codes,
)


def build_dataset(output: Path, task: str, tokenizer: str, template=None, command="", **options) -> TokenDataset:
    """``options`` are fields of ``Inputs`` and ``VocabOptions``."""
    inputs = Inputs(**{name: options.pop(name) for name in ("codes", "texts", "chats") if name in options})
    return module.build_dataset(output, task, tokenizer, inputs, VocabOptions(**options), template, command)


@pytest.fixture(autouse=True)
def letters(monkeypatch):
    monkeypatch.setattr(module, "load_tokenizer", lambda path: LetterTokenizer())


@pytest.fixture(scope="module")
def codes(tmp_path_factory) -> Path:
    prefix = tmp_path_factory.mktemp("codes") / "codes"
    write_codes(prefix, [(f"m:{n}", "fox", random_codes(5 + n, seed=n)) for n in range(1, 7)])
    return prefix


@pytest.mark.parametrize("layout_name", LAYOUTS)
@pytest.mark.parametrize("task", ["asr", "tts", "speech_lm"])
def test_every_utterance_becomes_a_document(codes, tmp_path, task, layout_name):
    dataset = build_dataset(tmp_path / "data", task=task, tokenizer="t", codes=[codes, codes], layout=layout_name)
    vocab = VocabLayout(LetterTokenizer.vocab_size, CODEBOOKS, CODEBOOK_SIZE, layout_name)
    assert dataset.vocab == vocab and len(dataset) == 12
    frames = sum(len(utterance.codes) for utterance in CodesDataset(codes))
    assert dataset.provenance["counts"]["audio_frames"] == 2 * frames
    for index, utterance in enumerate([*CodesDataset(codes)] * 2):
        expected = example_document(task, vocab, "fox", utterance.codes)
        np.testing.assert_array_equal(dataset.document(index).ids, expected.ids)
        np.testing.assert_array_equal(dataset.document(index).loss_mask, expected.loss_mask)


def test_provenance_says_what_it_was_made_from(codes, tmp_path):
    build_dataset(tmp_path / "data", task="tts", tokenizer="dir/t.model", codes=[codes], command="build it")
    provenance = TokenDataset(tmp_path / "data").provenance
    assert provenance["tokenizer"] == {"name": "t.model", "fingerprint": "letters"}
    assert provenance["codec"] == CodesDataset(codes).codec.to_dict()
    assert (provenance["template_version"], provenance["command"]) == (TEMPLATE_VERSION, "build it")
    assert provenance["sources"] == [str(codes)] and provenance["licenses"] == {str(codes): {"CC0": 1}}
    documents = list(TokenDataset(tmp_path / "data"))
    num_text = sum(int((document.ids < LetterTokenizer.vocab_size).sum()) for document in documents)
    assert provenance["counts"] == {
        "modality_positions": {"text": num_text, "audio": sum(map(len, documents)) - num_text},
        "documents": 6,
        "positions": sum(len(document) for document in documents),
        "target_positions": sum(int(document.loss_mask.sum()) for document in documents),
        "audio_frames": sum(len(utterance.codes) for utterance in CodesDataset(codes)),
        "examples": 6,
        "rejected": 0,
        "cut": 0,
    }
    assert provenance["special_tokens"]["begin_of_audio"] == TokenDataset(tmp_path / "data").vocab.begin_of_audio


def test_text_comes_from_manifests_or_from_transcripts(codes, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "one dog"}\n{"text": "two"}\n')
    size = {"num_codebooks": CODEBOOKS, "codebook_size": CODEBOOK_SIZE}
    plain = build_dataset(tmp_path / "plain", task="text_lm", tokenizer="t", texts=[tmp_path / "text.jsonl"], **size)
    assert plain.provenance["codec"] is None
    assert plain.document(0).ids.tolist() == [1, *LetterTokenizer().encode("one dog"), 2]
    transcripts = build_dataset(tmp_path / "transcripts", task="text_lm", tokenizer="t", codes=[codes])
    assert len(transcripts) == 6 and transcripts.document(3).ids.tolist() == [1, *LetterTokenizer().encode("fox"), 2]
    assert transcripts.vocab == plain.vocab


def test_licenses_of_texts_and_conversations_are_kept(codes, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "one", "license": "MIT"}\n{"text": "two"}\n')
    (tmp_path / "chat.jsonl").write_text(
        '{"license": "CC0", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    for kind, task in (("text", "text_lm"), ("chat", "chat")):
        path = tmp_path / f"{kind}.jsonl"
        options = {f"{kind}s": [path], "codes": [codes], "text_vocab_size": 40}
        dataset = build_dataset(tmp_path / task, task=task, tokenizer="t", **options)
        expected = {"MIT": 1, "unknown": 1} if kind == "text" else {"CC0": 1}
        assert dataset.provenance["licenses"] == {str(codes): {"CC0": 1}, str(path): expected}


@pytest.mark.parametrize(
    ("task", "options", "rule"),
    [
        ("asr", {"limit": LengthLimit(5)}, "none of 6 examples became a document: 6 longer than max_length=5"),
        ("interleaved", {}, "no example was found: interleaved needs recordings of at least two utterances"),
        ("chat", {"modes": ["S-S"]}, "none of 1 examples became a document: 1 without recordings for any of S-S"),
    ],
)
def test_a_dataset_of_nothing_says_why(codes, tmp_path, task, options, rule):
    alone = write_codes(tmp_path / "alone", [("a", "fox", random_codes(3)), ("b", "fox", random_codes(3))])
    (tmp_path / "chat.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    sources = [alone.prefix] if task == "interleaved" else [codes]
    chats = [tmp_path / "chat.jsonl"] if task == "chat" else []
    with pytest.raises(DataError, match=rule):
        build_dataset(
            tmp_path / "data", task=task, tokenizer="t", codes=sources, chats=chats, text_vocab_size=40,
            template=TemplateOptions(**options),
        )  # fmt: skip
    assert not list(tmp_path.glob("data*"))


def test_a_full_disk_is_one_line_and_leaves_nothing(codes, tmp_path):
    """A limit on file size stands in for a full disk: writing fails in the same way."""

    def on_a_full_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            build_dataset(tmp_path / "data" / "full", task="asr", tokenizer="t", codes=[codes] * 4)
        except DataError as error:
            os.write(writer, str(error).encode())

    reader, writer = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=on_a_full_disk)
    process.start()
    os.close(writer)
    process.join()
    assert os.read(reader, 1000).decode() == f"dataset {tmp_path}/data/full: cannot be written: File too large"
    assert not list((tmp_path / "data").iterdir())


def test_a_base_model_may_have_more_text_ids_than_its_tokenizer(codes, tmp_path):
    dataset = build_dataset(tmp_path / "data", task="asr", tokenizer="t", codes=[codes], text_vocab_size=100)
    assert dataset.vocab.begin_of_audio == 100


def test_further_modalities_are_kept_and_counted(codes, tmp_path):
    letters_of_fox = sorted(LetterTokenizer().encode("fox"))
    image = ModalityRange("image", letters_of_fox[0], letters_of_fox[1] + 1)
    dataset = build_dataset(tmp_path / "data", task="text_lm", tokenizer="t", codes=[codes], further_modalities=[image])
    assert dataset.vocab.further_modalities == [image]
    assert dataset.provenance["counts"]["modality_positions"] == {"text": 6 * 3, "audio": 0, "image": 6 * 2}


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"task": "sing"}, "task='sing': must be one of"),
        ({"task": "chat", "codes": True}, "task=chat: needs chats"),
        ({"task": "asr", "codes": True, "chats": ["c.jsonl"]}, "task=asr: takes no chats"),
        ({"task": "asr", "codes": True, "num_codebooks": 4}, "num_codebooks=4: must be at most 3"),
        ({"task": "asr"}, "needs codes"),
        ({"task": "text_lm"}, "needs texts or codes"),
        ({"task": "asr", "texts": ["a.jsonl"]}, "task=asr: takes no texts"),
        ({"task": "text_lm", "texts": ["a.jsonl"]}, "num_codebooks=None, codebook_size=None: both are required"),
        ({"task": "asr", "codes": True, "text_vocab_size": 10}, "text_vocab_size=10: must be at least 30"),
        ({"task": "asr", "codes": True, "codebook_size": 9}, "codebook_size=9: must be 50, as in codec loudness"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(codes, tmp_path, arguments, rule):
    if arguments.get("codes"):
        arguments = {**arguments, "codes": [codes]}
    with pytest.raises(ConfigError, match=rule):
        build_dataset(tmp_path / "data", tokenizer="t", **arguments)
    assert not list(tmp_path.iterdir())


def test_codes_of_different_codecs_do_not_mix(codes, tmp_path):
    for path in codes.parent.glob("codes.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    sidecar = json.loads((tmp_path / "codes.json").read_text())
    sidecar["codec"]["fingerprint"] = "f" * 64
    (tmp_path / "codes.json").write_text(json.dumps(sidecar))
    with pytest.raises(DataError, match=r"different codecs: loudness \(0+\), loudness \(f+\)"):
        build_dataset(tmp_path / "data", task="asr", tokenizer="t", codes=[codes, codes, tmp_path / "codes"])


def test_a_document_that_does_not_fit_is_named(codes, tmp_path, monkeypatch):
    tokenizer = LetterTokenizer()
    tokenizer.encode = lambda text: [77]
    monkeypatch.setattr(module, "load_tokenizer", lambda path: tokenizer)
    with pytest.raises(DataError, match="codes, m:1: text id 77 is outside the layout's 30 text ids"):
        build_dataset(tmp_path / "data", task="asr", tokenizer="t", codes=[codes])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_the_first_codebooks_may_do(codes, tmp_path, layout_name):
    options = {"task": "speech_lm", "tokenizer": "t", "codes": [codes], "layout": layout_name, "num_codebooks": 2}
    dataset = build_dataset(tmp_path / "data", **options)
    assert dataset.vocab.num_codebooks == 2 and dataset.provenance["codec"]["num_codebooks"] == CODEBOOKS
    for document, utterance in zip(dataset, CodesDataset(codes), strict=True):
        (found,) = audio_of(document, dataset.vocab)
        np.testing.assert_array_equal(found, utterance.codes[:, :2])
