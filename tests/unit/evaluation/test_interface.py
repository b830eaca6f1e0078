"""Likelihoods and answers of one tiny model, as a native checkpoint and as a Hugging Face export."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_most import parallel
from megatron_most.config import ParallelConfig
from megatron_most.data.building.tasks import prompt
from megatron_most.errors import CheckpointError, ConfigError, DataError
from megatron_most.evaluation.interface import EvaluatedModel, load_model, scored
from megatron_most.evaluation.likelihood import likelihoods
from megatron_most.evaluation.running import run_suite
from megatron_most.evaluation.suites.text import TextSuite
from megatron_most.inference import Decoding, Generator, Sampling, answer
from megatron_most.inference.hugging_face import HuggingFaceGenerator
from megatron_most.inference.loading import LoadedModel
from megatron_most.vocab import NO_CODE
from tests.unit.evaluation.stubs import write_tokenizer
from tests.unit.huggingface.exports import config_of, exported, exported_model, native_model, parameters


class Letters:
    """Ids 3.. are letters; 0 pads, 1 begins, 2 ends. The models have 7 text ids more."""

    bos_id, eos_id, pad_id, vocab_size, fingerprint = 1, 2, 0, 33, "letters"

    def encode(self, text: str) -> list[int]:
        return [3 + ord(letter) % 30 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def special_id(self, token: str) -> int | None:
        return None


def documents_of(vocab) -> list:
    random = np.random.default_rng(0)
    codes = [random.integers(0, vocab.codebook_size, (frames, vocab.num_codebooks)) for frames in (3, 7, 5)]
    segments = [([], [codes[0]]), (["hear"], [codes[1]]), ([codes[2]], ["hello"]), (["a b"], ["c"])]
    return [scored(vocab, Letters(), before, after) for before, after in segments]


def by_hand(model, vocab, document) -> tuple[list[float], list[float]]:
    """Log-probabilities of the targets, over all ids and over those of their modality, one position after another."""
    ids = torch.from_numpy(document.ids)[None]
    codes = None if document.side_codes is None else torch.from_numpy(document.side_codes)[None]
    with torch.no_grad():
        logits, code_logits = model(ids, vocab.modality_of(ids), torch.zeros_like(ids, dtype=torch.bool), codes=codes)
    whole, own = [], []
    for place in np.flatnonzero(document.loss_mask):
        row, label = logits[0, place - 1].double(), int(document.ids[place])
        allowed = list(range(40, vocab.size)) if label >= 40 else list(range(Letters.vocab_size))
        every, mine = row.softmax(0)[label].log(), row[allowed].softmax(0)[allowed.index(label)].log()
        if codes is not None:
            for book, code in enumerate(document.side_codes[place]):
                if code != NO_CODE:
                    of_book = code_logits[0, place - 1, book].double()
                    every = every + of_book.softmax(0)[code].log()
                    mine = mine + of_book[: vocab.codebook_size].softmax(0)[code].log()
        whole.append(float(every))
        own.append(float(mine))
    return whole, own


@pytest.mark.parametrize("case", parameters(["frame", "frame_delay", "flat", "flat_delay", "gqa"]))
def test_likelihoods_are_those_of_each_position_and_the_same_in_an_export(case):
    config = config_of(case)
    vocab, documents = config.vocab, documents_of(config.vocab)
    exported = HuggingFaceGenerator(exported_model(case), vocab)
    theirs = likelihoods(documents, vocab, Letters.vocab_size, exported.logits)
    with native_model(case) as native:
        expected = [by_hand(native, vocab, document) for document in documents]
        generator = Generator(native)
        mine = likelihoods(documents, vocab, Letters.vocab_size, generator.logits)
        one_by_one = [likelihoods([one], vocab, Letters.vocab_size, generator.logits, 1)[0] for one in documents]
    for found in (mine, one_by_one, theirs):
        for one, (whole, own) in zip(found, expected, strict=True):
            np.testing.assert_allclose(one.whole, whole, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(one.own, own, rtol=1e-4, atol=1e-4)
    assert all((one.own > one.whole).all() for one in mine)  # fewer to choose from
    layout = vocab.codec_layout
    assert [one.count for one in mine] == [layout.num_positions(3), layout.num_positions(7), 5, 1]


@pytest.mark.parametrize("case", parameters(["frame", "flat_delay", "gqa"]))
def test_an_export_answers_as_the_checkpoint_does(case):
    config, random = config_of(case), np.random.default_rng(1)
    vocab = config.vocab
    codes = [random.integers(0, vocab.codebook_size, (frames, vocab.num_codebooks)) for frames in (2, 5)]
    asr = [prompt("asr", vocab, Letters(), codes=one) for one in codes]
    tts = [prompt("tts", vocab, Letters(), text=text) for text in ("hello", "a")]
    written, spoken = Decoding(max_new=8), Decoding(max_seconds=0.4)
    answers: list[tuple] = []
    either: list[tuple] = []

    def ask(generator) -> None:
        model = EvaluatedModel(LoadedModel(generator, Letters(), Codec(), config, None), {"name": case})
        answers.append((model.generate(asr, written), model.generate(tts, spoken, speech=True)))
        sampled = Decoding(max_new=8, max_seconds=0.4, sampling=Sampling(temperature=1.0, seed=3))
        together, alone = model.generate(asr, sampled), [model.generate([one], sampled)[0] for one in asr]
        assert [one.text for one in together] == [one.text for one in alone]
        decoding = Decoding(max_new=3, max_seconds=0.4, sampling=Sampling(repetition_penalty=1.3))
        mixed = answer(model.loaded, asr, "either", decoding, alternates=True)
        few = [one.text for one in together]
        either.append(([[str(segment) for segment in one.segments] for one in mixed], few))

    with native_model(case) as native:
        ask(Generator(native))
    ask(HuggingFaceGenerator(exported_model(case), vocab))
    (native_text, native_speech), (hf_text, hf_speech) = answers
    assert either[0] == either[1]  # a seed draws the same from both
    assert native_text == hf_text and len({one.text for one in native_text}) == 2
    assert [one.at_limit for one in native_speech] == [one.at_limit for one in hf_speech]
    for mine, theirs in zip(native_speech, hf_speech, strict=True):
        np.testing.assert_array_equal(mine.codes, theirs.codes)


class Codec:
    frame_rate = 10.0


def test_the_most_probable_continuation_is_greedy():
    config = config_of("frame")
    vocab, start = config.vocab, prompt("text_lm", config.vocab, Letters(), text="say")
    with native_model("frame") as native:
        generator = Generator(native)
        [ids] = generator.text([start], end=2, max_new=3, sampling=Sampling(), num_text_ids=Letters.vocab_size)
        likely, unlikely = (document_with(start, vocab, row) for row in (ids, [ids[0], (ids[1] + 1) % 33, ids[2]]))
        found = likelihoods([likely, unlikely], vocab, Letters.vocab_size, generator.logits)
    assert [one.is_greedy for one in found] == [True, False]


def document_with(start, vocab, ids: list[int]):
    start = type(start)(np.append(start.ids, ids), np.append(start.loss_mask, [True] * len(ids)))
    start.coded, start.codes = np.empty(0, np.int64), np.empty((0, vocab.num_codebooks), np.int64)
    return start


def test_a_checkpoint_and_its_export_are_loaded_and_judged_alike(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "fox.txt").write_text("the fox and the dog, and a fox. " * 9)
    found = []
    for place, folder in enumerate(exported("gqa")):
        output = tmp_path / f"{place}.json"
        model = load_model(str(folder), str(tmp_path), needs_codec=False)
        with pytest.raises(ConfigError, match=f"{folder}: was loaded without a codec"):
            model.codec.encode(np.zeros(9))
        found.append(run_suite(TextSuite(tmp_path / "fox.txt"), model, output))
    parallel.destroy()
    native, hf = found
    assert hf["score"] == pytest.approx(native["score"], rel=1e-5) and hf["num_samples"] == native["num_samples"] > 2
    assert (native["model"]["kind"], native["model"]["step"], hf["model"]["kind"]) == ("native", 7, "hf")


def test_what_cannot_be_loaded_is_refused(tmp_path):
    checkpoint, export = exported("gqa")
    with pytest.raises(ConfigError, match="an export is not split over ranks"):
        load_model(str(export), layout=ParallelConfig(tensor_model_parallel_size=2))
    with pytest.raises(ConfigError, match="generation splits a model over tensor- and expert-parallel ranks alone"):
        write_tokenizer(tmp_path)
        load_model(
            str(checkpoint), str(tmp_path), needs_codec=False, layout=ParallelConfig(pipeline_model_parallel_size=2)
        )
    with pytest.raises(ConfigError, match="has no codec; pass one with --codec"):
        load_model(str(checkpoint), str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError):
        load_model(str(tmp_path), str(tmp_path))
    with pytest.raises(DataError, match="document: nothing to score"):
        scored(config_of("gqa").vocab, Letters(), ["a"], [])
