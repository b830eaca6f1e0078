"""Text and speech from the exported model: what the native generator writes, and prompts and examples as training's."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_most.data.building.tasks import ChatTurn, make_chat, make_document, prompt
from megatron_most.data.storage.documents import Document
from megatron_most.huggingface import MoSTProcessor
from megatron_most.huggingface.codec_layout_most import CodecLayout
from megatron_most.huggingface.generation_most import Sampler, SpeechState
from megatron_most.inference import Generator, Sampling
from megatron_most.text import load_tokenizer, train_sentencepiece
from megatron_most.vocab import CODEC_LAYOUTS, NO_CODE, VocabLayout
from tests.unit.huggingface.exports import exported_model, native_model, parameters

LAYOUTS = ["frame", "frame_delay", "flat", "flat_delay"]
BEGIN = 40  # of audio: the tiny models have 40 text ids
SENTENCES = ["the old brown dog sees seven gray cats", "Say: Transcribe: Answer aloud in writing."] * 4


def codes_of(num_frames: int, num_codebooks: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 16, (num_frames, num_codebooks))


def vocab_of(layout: str, num_codebooks: int = 3) -> VocabLayout:
    return VocabLayout(text_vocab_size=BEGIN, num_codebooks=num_codebooks, codebook_size=16, layout=layout)


def layout_of(vocab: VocabLayout) -> CodecLayout:
    return CodecLayout(vocab.layout, vocab.frame, vocab.num_codebooks, vocab.codebook_size)


@pytest.mark.parametrize("layout", CODEC_LAYOUTS)
@pytest.mark.parametrize("num_codebooks", [2, 3, 5])
def test_frames_are_laid_out_as_in_training(layout, num_codebooks):
    vocab = vocab_of(layout, num_codebooks)
    for num_frames in range(1, 9):
        codes = codes_of(num_frames, num_codebooks, seed=num_frames)
        expected_ids, expected_codes = vocab.codec_layout.encode(codes)
        ids, side_codes = layout_of(vocab).encode(codes)
        assert np.array_equal(ids, expected_ids) and np.array_equal(side_codes, expected_codes)
        assert np.array_equal(layout_of(vocab).decode(ids, side_codes), codes)


@pytest.mark.parametrize("layout", CODEC_LAYOUTS)
@pytest.mark.parametrize("num_codebooks", [2, 3, 5])
def test_what_may_follow_in_speech_is_what_the_layout_allows(layout, num_codebooks):
    """Over every way to go on: the next frame wherever one may begin, or the end of the audio."""
    vocab, max_frames = vocab_of(layout, num_codebooks), 6
    native = vocab.codec_layout
    for num_frames in range(1, max_frames + 1):
        ids, side_codes = native.encode(codes_of(num_frames, num_codebooks))
        state = SpeechState(layout_of(vocab), vocab.end_of_audio, max_frames)
        frames = 0
        for position, id_ in enumerate([*ids.tolist(), vocab.end_of_audio]):
            allowed = {i for run in state.allowed() for i in run}
            expected_ids, may_end = native.allowed_next(position, frames)
            expected = set(expected_ids) | ({vocab.end_of_audio} if may_end else set())
            if frames == max_frames:
                expected -= set(native.leading_ids)
            assert allowed == expected, (num_frames, position)
            frames += bool(native.is_leading(id_))
            has_code = state.advance(id_)
            if id_ != vocab.end_of_audio:
                assert np.array_equal(has_code, side_codes[position] != NO_CODE)
        assert state.is_done and list(state.allowed()) == [range(vocab.end_of_audio, vocab.end_of_audio + 1)]


@pytest.mark.parametrize("case", parameters([*LAYOUTS, "gqa_yarn", "bias", "per_modality"]))
def test_greedy_text_and_speech_are_the_native_generators(case):
    """Prompts of unequal length, in one batch."""
    model = exported_model(case)
    with native_model(case) as native:
        vocab, generator = native.vocab, Generator(native)
        texts = [[1, 7, 9, 12, 5], [1, 3]]
        heard = [codes_of(frames, vocab.num_codebooks, seed=frames) for frames in (3, 6)]
        asr = [_document([1, 7], vocab, codes) for codes in heard]
        tts = [Document(np.array([*text, vocab.begin_of_audio]), np.zeros(len(text) + 1, bool)) for text in texts]
        expected_text = generator.text(asr, 2, 12, Sampling(), forbidden=(1, 0))
        expected_speech = generator.speech(tts, 7, Sampling())
    processor = _bare_processor(vocab)
    inputs = processor.collate([_values(document, vocab) for document in asr])
    found = model.generate(
        **inputs, max_new_tokens=12, eos_token_id=2, pad_token_id=0, suppress_tokens=[0, 1], do_sample=False
    )[:, inputs["input_ids"].shape[1] :]
    for row, expected in zip(found.tolist(), expected_text, strict=True):
        assert row[: row.index(2) if 2 in row else None] == expected
    speech = model.generate_speech(**processor.collate([_values(document, vocab) for document in tts]), max_frames=7)
    for mine, expected in zip(speech, expected_speech, strict=True):
        assert np.array_equal(mine, expected)
    assert len({codes.tobytes() for codes in speech}) == 2


def test_sampling_is_seeded_and_stays_within_the_grammar():
    model = exported_model("flat_delay")
    inputs = {"input_ids": torch.tensor([[1, 5, BEGIN]] * 3)}
    sampling = {"max_frames": 5, "temperature": 1.0, "top_k": 12, "top_p": 0.9}
    first, again, other = (model.generate_speech(**inputs, **sampling, seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(1 <= len(codes) <= 5 and codes.min() >= 0 and codes.max() < 16 for codes in first)


def test_top_k_and_top_p_leave_out_what_is_unlikely():
    logits = torch.tensor([[5.0, 4.0, 3.0, -9.0]]).expand(200, -1)
    for options, expected in (({"top_k": 2}, {0, 1}), ({"top_p": 0.5}, {0}), ({}, {0, 1, 2})):
        assert set(Sampler(logits.device, 1.0, **options)(logits).tolist()) == expected
    with pytest.raises(ValueError, match="top_p=0"):
        Sampler(logits.device, 1.0, top_p=0)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """This project's and transformers', of the same SentencePiece model."""
    from transformers import LlamaTokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece(SENTENCES, path, 320)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return load_tokenizer(path), LlamaTokenizer.from_pretrained(path.parent, legacy=False, **tokens)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompts_and_examples_are_those_of_training(layout, tokenizers):
    native, theirs = tokenizers
    vocab = VocabLayout(text_vocab_size=native.vocab_size + 3, num_codebooks=3, codebook_size=16, layout=layout)
    processor, codes = _processor(vocab, theirs), codes_of(4, 3)
    said = "  the old cat </s> sees "
    pairs = [
        (processor.transcription_prompts([codes]), prompt("asr", vocab, native, codes=codes)),
        (processor.speech_prompts([said]), prompt("tts", vocab, native, text=said)),
        (processor(said), prompt("text_lm", vocab, native, text=said)),
    ]
    for task in ("asr", "tts"):
        document = make_document(task, vocab, native, text=said, codes=codes)
        pairs.append((processor.collate([processor.example(task, said, codes)]), document))
    pairs.append(
        (processor.collate([processor.example("text", said)]), make_document("text_lm", vocab, native, text=said))
    )
    for found, document in pairs:
        _assert_is(found, document, vocab)


@pytest.mark.parametrize("answer", ["written", "spoken"])
def test_a_conversation_is_that_of_training(answer, tokenizers):
    native, theirs = tokenizers
    vocab = VocabLayout(text_vocab_size=native.vocab_size + 3, num_codebooks=3, codebook_size=16)
    codes = codes_of(4, 3)
    said = [("system", "old cats", None), ("user", "seven", None), ("assistant", "", codes), ("user", "", codes)]
    expected = make_chat(vocab, native, [ChatTurn(*turn) for turn in said], answer=answer)
    turns = [
        {"role": role, "content": text} if spoken is None else {"role": role, "codes": spoken}
        for role, text, spoken in said
    ]
    _assert_is(_processor(vocab, theirs).chat_prompts([turns], answer), expected, vocab)


def test_the_three_ways_to_use_it(tokenizers):
    """Transcribe, speak and chat, with a model that has room for the tokenizer's ids."""
    from megatron_most.huggingface import MoSTConfig, MoSTForConditionalGeneration

    native, theirs = tokenizers
    vocab = VocabLayout(text_vocab_size=native.vocab_size + 3, num_codebooks=3, codebook_size=16)
    torch.manual_seed(0)
    config = MoSTConfig(
        text_vocab_size=vocab.text_vocab_size,
        num_text_ids=native.vocab_size,
        num_codebooks=3,
        codebook_size=16,
        eos_token_id=native.eos_id,
    )
    model, processor = MoSTForConditionalGeneration(config).eval(), _processor(vocab, theirs)
    texts = model.transcribe(processor, [codes_of(2, 3), codes_of(5, 3)], max_new_tokens=4)
    assert len(texts) == 2 and all(isinstance(text, str) for text in texts)
    assert [codes.shape[1] for codes in model.speak(processor, ["cats", "the old dog"], max_frames=4)] == [3, 3]
    turns = [{"role": "user", "content": "seven"}]
    assert isinstance(model.chat(processor, turns, max_new_tokens=4), str)
    assert model.chat(processor, turns, answer="spoken", max_frames=4).shape[1] == 3


def test_a_processor_comes_back_from_its_folder(tokenizers, tmp_path):
    vocab = VocabLayout(text_vocab_size=tokenizers[0].vocab_size + 3, num_codebooks=3, codebook_size=16)
    processor = _processor(vocab, tokenizers[1])
    processor.save_pretrained(tmp_path)
    again = MoSTProcessor.from_pretrained(tmp_path)
    assert again.role_ids == processor.role_ids and again.instructions == processor.instructions
    first, second = (entry.speech_prompts(["old cats"])["input_ids"] for entry in (processor, again))
    assert torch.equal(first, second)


def _document(text: list[int], vocab: VocabLayout, codes: np.ndarray) -> Document:
    """A text, then audio; as a prompt."""
    ids, side_codes = vocab.codec_layout.encode(codes)
    ids = np.concatenate([text, [vocab.begin_of_audio], ids, [vocab.end_of_audio]])
    document = Document(ids, np.zeros(len(ids), bool))
    if vocab.codec_layout.uses_side_codes:
        document.coded = np.arange(len(text) + 1, len(ids) - 1)
        document.codes = side_codes
    return document


def _values(document: Document, vocab: VocabLayout) -> dict[str, np.ndarray]:
    values = {"input_ids": document.ids}
    if vocab.codec_layout.uses_side_codes:
        nothing = np.full((len(document), vocab.num_codebooks), NO_CODE)
        values["codes"] = nothing if document.codes is None else document.side_codes
    return values


def _assert_is(found, document: Document, vocab: VocabLayout) -> None:
    assert found["input_ids"][0].tolist() == document.ids.tolist()
    if vocab.codec_layout.uses_side_codes:
        assert found["codes"][0].tolist() == _values(document, vocab)["codes"].tolist()
    if "labels" in found:
        assert found["labels"][0].tolist() == np.where(document.loss_mask, document.ids, -100).tolist()


def _bare_processor(vocab: VocabLayout) -> SimpleNamespace:
    return SimpleNamespace(collate=lambda documents: MoSTProcessor.collate(None, documents))


def _processor(vocab: VocabLayout, tokenizer) -> MoSTProcessor:
    from megatron_most.data.building.instructions import INSTRUCTIONS

    size = vocab.text_vocab_size
    return MoSTProcessor(
        tokenizer,
        codec_layout=vocab.layout,
        text_vocab_size=size,
        num_codebooks=vocab.num_codebooks,
        codebook_size=vocab.codebook_size,
        instructions={purpose: wordings[0] for purpose, wordings in INSTRUCTIONS.items()},
        role_ids={"system": size - 1, "user": size - 2, "assistant": size - 3},
    )
