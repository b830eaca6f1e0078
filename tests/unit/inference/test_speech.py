"""Transcribing and speaking through a tiny random model, a tokenizer of single letters and no codec at all."""

from types import SimpleNamespace

import numpy as np
import pytest

from megatron_most import parallel
from megatron_most.data.building.tasks import prompt
from megatron_most.inference import Generator, Sampling, speak, transcribe
from megatron_most.inference.loading import LoadedModel
from megatron_most.model import build_model
from tests.distributed.shards import fill_weights
from tests.distributed.tiny import tiny_config


class Letters:
    """Ids 3.. are letters; 0 pads, 1 begins, 2 ends. The model has 7 text ids more."""

    bos_id, eos_id, pad_id, vocab_size = 1, 2, 0, 33

    def encode(self, text: str) -> list[int]:
        return [3 + ord(letter) % 30 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return " ".join(str(token_id) for token_id in ids)


@pytest.fixture(scope="module", params=["frame", "flat"])
def model(request):
    config = tiny_config(vocab__layout=request.param, data__seq_length=96)
    parallel.initialize(config.parallel, seed=1)
    chunks = build_model(config)
    fill_weights(chunks, std=0.3)
    codec = SimpleNamespace(frame_rate=10.0)
    yield LoadedModel(Generator(chunks[0]), Letters(), codec, config, metadata=None)
    parallel.destroy()


def utterances(model, count: int) -> list[np.ndarray]:
    random, vocab = np.random.default_rng(0), model.config.vocab
    return [random.integers(0, vocab.codebook_size, (2 + 3 * i, vocab.num_codebooks)) for i in (2, 0, 3, 1, 2)][:count]


def test_transcripts_come_in_the_order_of_the_utterances_whatever_the_batches(model):
    codes = utterances(model, 5)
    one_by_one = [transcribe(model, [utterance], max_new=8)[0] for utterance in codes]
    assert len(set(one_by_one)) > 2
    assert transcribe(model, codes, max_new=8, batch_size=2) == one_by_one
    assert transcribe(model, codes, max_new=8, batch_size=5) == one_by_one


def test_speech_comes_in_the_order_of_the_texts_and_within_the_time_allowed(model):
    texts = ["a longer text", "b", "some text"]
    one_by_one = [speak(model, [text], max_seconds=0.7)[0] for text in texts]
    for batch_size in (1, 3):
        together = speak(model, texts, max_seconds=0.7, batch_size=batch_size)
        assert all(np.array_equal(a, b) for a, b in zip(together, one_by_one, strict=True))
    assert all(1 <= len(codes) <= 7 for codes in one_by_one)


def test_speech_has_a_frame_however_little_time_is_allowed(model):
    assert [len(codes) for codes in speak(model, ["a", "some text"], max_seconds=0.01)] == [1, 1]


def test_transcripts_hold_only_ids_that_the_tokenizer_has(model):
    assert model.config.vocab.text_vocab_size > Letters.vocab_size
    codes = utterances(model, 5) * 4
    sampled = " ".join(transcribe(model, codes, max_new=12, sampling=Sampling(temperature=5.0)))
    ids = [int(token_id) for token_id in sampled.split()]
    assert len(ids) > 100
    assert set(ids) <= set(range(3, Letters.vocab_size))


def test_sampled_speech_differs_from_greedy(model):
    [greedy] = speak(model, ["hello"], max_seconds=0.8)
    [sampled] = speak(model, ["hello"], max_seconds=0.8, sampling=Sampling(temperature=3.0, seed=1))
    assert greedy.shape != sampled.shape or (greedy != sampled).any()


def test_an_answer_fills_the_context_beside_its_own_prompt_whatever_the_batch(model):
    codes = utterances(model, 3)
    at_limit: list[int] = []
    together = transcribe(model, codes, on_limit=at_limit.append)
    assert together == [transcribe(model, [utterance])[0] for utterance in codes]
    context = model.config.data.seq_length
    rooms = [
        context - len(prompt("asr", model.config.vocab, model.tokenizer, codes=utterance).ids) for utterance in codes
    ]
    lengths = [len(text.split()) for text in together]
    assert all(length <= room for length, room in zip(lengths, rooms, strict=True))
    assert sorted(at_limit) == [index for index in range(3) if lengths[index] == rooms[index]]


def test_speech_that_reaches_its_limit_is_told(model):
    at_limit: list[int] = []
    spoken = speak(model, ["a", "b c"], max_seconds=0.1, on_limit=at_limit.append)
    assert [len(codes) for codes in spoken] == [1, 1]
    assert sorted(at_limit) == [0, 1]


def test_what_is_sampled_for_an_utterance_does_not_depend_on_its_batch(model):
    sampling, codes, texts = Sampling(temperature=1.0, seed=7), utterances(model, 3), ["a longer text", "b"]
    one_by_one = [transcribe(model, [utterance], 6, sampling)[0] for utterance in codes]
    assert transcribe(model, codes, 6, sampling) == one_by_one
    alone = [speak(model, [text], 0.5, sampling)[0] for text in texts]
    together = speak(model, texts, 0.5, sampling)
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))
