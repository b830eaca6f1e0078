"""Answers of both forms: cached as without a cache, piece by piece as whole, and chats that use them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from megatron_most import parallel
from megatron_most.data.building.tasks import ChatTurn, continuation_prompt, make_chat, prompt
from megatron_most.errors import ConfigError, DataError
from megatron_most.inference import Answer, Conversation, Decoding, Generator, Sampling, answer, stream
from megatron_most.inference.loading import LoadedModel
from megatron_most.model import build_model
from megatron_most.vocab import CODEC_LAYOUTS
from tests.distributed.shards import fill_weights
from tests.distributed.tiny import tiny_config
from tests.unit.audio.test_sound_stream import FilterCodec
from tests.unit.inference.greedy import Greedy

GQA: dict[str, Any] = {
    "model__attention__type": "gqa",
    "model__attention__num_query_groups": 2,
    "model__attention__kv_channels": 8,
}
FAMILIES: dict[str, dict[str, Any]] = {"latent": {}, "grouped-query": GQA}
WORDS = set(range(3, 12))


class Numbers:
    """Few words, so that a random model often prefers to speak. 0 pads, 1 begins, 2 ends."""

    bos_id, eos_id, pad_id, vocab_size, fingerprint = 1, 2, 0, 12, "numbers"

    def encode(self, text: str) -> list[int]:
        return [3 + ord(letter) % 9 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(f"{token} " for token in ids)

    def special_id(self, token: str) -> int | None:
        return None


def load(**overrides: Any) -> Iterator[LoadedModel]:
    config = tiny_config(**{"data__seq_length": 96, "model__num_layers": 2} | overrides)
    parallel.initialize(config.parallel, seed=1)
    chunks = build_model(config)
    fill_weights(chunks, std=0.3)
    with torch.no_grad():  # so that about half of all texts become audio
        chunks[0].output_layer.weight[config.vocab.begin_of_audio] *= 4
    codec = FilterCodec([0.5, 0.3, 0.2], num_codebooks=config.vocab.num_codebooks, codebook_size=16)
    yield LoadedModel(Generator(chunks[0]), Numbers(), codec, config, metadata=None)
    parallel.destroy()


@pytest.fixture(scope="module", params=[f"{family} {layout}" for family in FAMILIES for layout in CODEC_LAYOUTS])
def model(request: pytest.FixtureRequest) -> Iterator[LoadedModel]:
    family, layout = request.param.split()
    yield from load(vocab__layout=layout, data__seq_length=56, **FAMILIES[family])


@pytest.fixture(scope="module")
def one_model() -> Iterator[LoadedModel]:
    yield from load(vocab__layout="frame_delay")


def codes_of(model: LoadedModel, num_frames: int, seed: int = 0) -> np.ndarray:
    vocab = model.config.vocab
    return np.random.default_rng(seed).integers(0, vocab.codebook_size, (num_frames, vocab.num_codebooks))


def prompts_of(model: LoadedModel, form: str) -> list[Any]:
    """Of unequal lengths: texts, and audio; inside audio of no, few and many frames if ``form`` is spoken."""
    vocab, spoken = model.config.vocab, form == "spoken"
    segments: list[list[Any]] = [
        ["a long beginning"],
        ["b", codes_of(model, 1)],
        [codes_of(model, 6, 2)],
        ["x"],
        ["yz"],
        ["w"],
    ]
    return [continuation_prompt(vocab, model.tokenizer, one, spoken=spoken) for one in segments]


def expected_of(
    model: LoadedModel, one: Any, reference: Greedy, form: str, max_new: int | None
) -> tuple[list[Any], bool]:
    """The segments of an answer, by the plain way, and whether it ended by itself."""
    vocab, layout = model.config.vocab, model.config.vocab.codec_layout
    start = len(one.ids)
    num_before = None
    if form == "spoken":
        start = 1 + int(np.flatnonzero(one.ids == vocab.begin_of_audio)[-1])
        num_before = int(layout.is_leading(one.ids[start:]).sum())
    room = model.config.data.seq_length - len(one.ids)
    limit = min(room, max_new) if form == "written" and max_new else room
    ids, codes, is_ended = reference.run(one, num_before, limit)
    segments: list[Any] = []
    begun = [(one.ids[start:].tolist(), ([] if one.side_codes is None else one.side_codes[start:].tolist()))]
    run_ids, run_codes = begun[0] if form == "spoken" else ([], [])
    if not run_codes:
        run_codes = [[-1] * vocab.num_codebooks] * len(run_ids)
    in_audio, before = form == "spoken", num_before or 0
    for id_, row in [*zip(ids, codes, strict=True), (None, None)]:
        if id_ in (None, vocab.begin_of_audio, vocab.end_of_audio):
            if run_ids and in_audio:
                frames = layout.whole_frames(np.array(run_ids), np.array(run_codes))[before:]
                segments += [frames.tolist()] if len(frames) else []
            elif run_ids:
                segments.append(model.tokenizer.decode(run_ids))
            run_ids, run_codes, before, in_audio = [], [], 0, id_ == vocab.begin_of_audio
        else:
            run_ids, run_codes = [*run_ids, id_], [*run_codes, row]
    return segments, is_ended


def plain(found: Answer) -> list[Any]:
    return [one if isinstance(one, str) else one.tolist() for one in found.segments]


CASES: dict[str, tuple[str, bool, str, Decoding]] = {
    "written": ("written", False, "never", Decoding(max_new=14)),
    "penalized": ("written", False, "never", Decoding(max_new=14, sampling=Sampling(repetition_penalty=1.5))),
    "spoken": ("spoken", False, "never", Decoding(max_seconds=0.7)),
    "either": ("either", False, "first", Decoding(max_new=9, max_seconds=0.5)),
    "alternates": ("either", True, "anywhere", Decoding(max_new=3, max_seconds=0.4)),
}


@pytest.mark.parametrize("case", CASES)
def test_prompts_of_all_lengths_are_answered_as_without_cache_and_batch(model: LoadedModel, case: str) -> None:
    """Greedy, token for token."""
    form, alternates, begins, decoding = CASES[case]
    max_frames = int((decoding.max_seconds or 9) * model.codec.frame_rate)
    ends = {model.config.vocab.end_of_audio} if form == "spoken" else {2}
    penalty = decoding.sampling.repetition_penalty
    reference = Greedy(model.generator, WORDS, ends, begins, decoding.max_new or 1000, max_frames, penalty)
    prompts = prompts_of(model, form)
    found = answer(model, prompts, form, decoding, alternates=alternates)
    for one, mine in zip(prompts, found, strict=True):
        segments, is_ended = expected_of(model, one, reference, form, decoding.max_new)
        assert plain(mine) == segments
        if form == "either" and not is_ended:
            assert mine.at_limit
    kinds = {type(segment) for one in found for segment in one.segments}
    expected = {"written": {str}, "spoken": {np.ndarray}}.get(form)
    assert kinds == expected if expected else kinds <= {str, np.ndarray}


@pytest.mark.parametrize("model", [f"latent {layout}" for layout in CODEC_LAYOUTS], indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_pieces_are_the_whole_answer(model: LoadedModel, case: str) -> None:
    form, alternates, _, decoding = CASES[case]
    for one in prompts_of(model, form)[2:]:
        [whole] = answer(model, [one], form, decoding, alternates=alternates)
        pieces, returned = collect(stream(model, one, form, decoding, alternates=alternates))
        assert plain(returned) == plain(whole) and returned.at_limit == whole.at_limit
        assert "".join(piece for piece in pieces if isinstance(piece, str)) == whole.text
        sound = [piece for piece in pieces if not isinstance(piece, str)]
        spoken = [segment for segment in whole.segments if not isinstance(segment, str)]
        heard = np.concatenate([model.codec.decode(codes) for codes in spoken]) if spoken else np.zeros(0)
        if form != "spoken" or len(one.ids) == 4:  # else the sound goes on from the prompt's
            np.testing.assert_allclose(np.concatenate([np.zeros(0), *sound]), heard, atol=1e-6)


def collect(pieces: Any) -> tuple[list[Any], Answer]:
    found = []
    while True:
        try:
            found.append(next(pieces))
        except StopIteration as stop:
            return found, stop.value


@pytest.mark.parametrize("model", [f"latent {layout}" for layout in CODEC_LAYOUTS], indirect=True)
def test_sound_goes_on_from_that_of_the_prompt(model: LoadedModel) -> None:
    """The sound after a recording is that of both together."""
    given = codes_of(model, 5)
    one = continuation_prompt(model.config.vocab, model.tokenizer, [given], spoken=True)
    for seed in range(50):
        sampling = Sampling(temperature=1.0, seed=seed)
        pieces, whole = collect(stream(model, one, "spoken", Decoding(max_seconds=0.6, sampling=sampling)))
        if whole.codes is not None and len(whole.codes) > 3:
            break
    assert whole.codes is not None, "a random model that never speaks shows nothing"
    together = model.codec.decode(np.concatenate([given, whole.codes]))[5 * model.codec.samples_per_frame :]
    if "delay" not in model.config.vocab.layout:  # a delay pattern makes the last codes of the last frames anew
        np.testing.assert_allclose(np.concatenate(pieces), together, atol=1e-6)
    assert sum(map(len, pieces)) == len(together)


def test_text_comes_while_it_is_written(one_model: LoadedModel) -> None:
    one = prompt("text_lm", one_model.config.vocab, one_model.tokenizer, text="a")
    pieces, whole = collect(stream(one_model, one, "written", Decoding(max_new=12)))
    assert len(pieces) > 1 and "".join(pieces) == whole.text
    pieces = stream(one_model, one, "written", Decoding(max_new=12))
    assert whole.text.startswith(next(pieces))
    [between] = answer(one_model, [one], decoding=Decoding(max_new=12))  # while the other is not at its end
    assert between.text == whole.text == collect(pieces)[1].text


class Letters(Numbers):
    """Ids are bytes: two of them make a character that is not ASCII."""

    def decode(self, ids: list[int]) -> str:
        return bytes((0x61, 0xC3, 0xA9)[token % 3] for token in ids).decode("utf-8", "replace")


def test_half_a_character_is_not_given(one_model: LoadedModel) -> None:
    loaded = LoadedModel(one_model.generator, Letters(), one_model.codec, one_model.config, None)
    one = prompt("text_lm", loaded.config.vocab, loaded.tokenizer, text="a")
    pieces, whole = collect(stream(loaded, one, "written", Decoding(max_new=30)))
    assert "".join(pieces) == whole.text
    assert all(not piece.endswith("\ufffd") for piece in pieces[:-1])


def test_a_chat_holds_what_was_said_in_both_forms(one_model: LoadedModel) -> None:
    vocab, conversation = one_model.config.vocab, Conversation(one_model, system="be kind")
    sound = one_model.codec.decode(codes_of(one_model, 4))
    heard = one_model.codec.encode(sound)[:, : vocab.num_codebooks]
    said = [ChatTurn("system", "be kind")]
    for turn, form in (("hello", "spoken"), (sound, "written")):
        conversation.say(turn)
        said.append(ChatTurn("user", turn) if isinstance(turn, str) else ChatTurn("user", "", heard))
        asked = make_chat(vocab, one_model.tokenizer, said, answer=form)
        for seed in range(50):  # until the random model says something
            short = Decoding(5, 0.3, Sampling(temperature=1.0, seed=seed))
            [expected] = answer(one_model, [asked], form, short)
            if expected.segments:
                break
        _, found = collect(conversation.answer(form, short))
        assert plain(found) == plain(expected) and found.segments
        said.append(ChatTurn("assistant", found.text, found.codes))
    assert [turn.role for turn in conversation.turns] == ["system", "user", "assistant", "user", "assistant"]
    with pytest.raises(DataError, match="text is empty"):
        conversation.say("  ")


def test_a_chat_forgets_its_oldest_exchanges_and_keeps_the_system_message(one_model: LoadedModel) -> None:
    conversation = Conversation(one_model, system="be kind")
    for turn in range(6):
        conversation.say(f"turn number {turn}")
        collect(conversation.answer("written", Decoding(max_new=8)))
    assert conversation.num_forgotten > 0
    assert conversation.turns[0].text == "be kind" and conversation.turns[1].role == "user"
    conversation.say("a turn that is much too long for the context " * 3)
    with pytest.raises(ConfigError, match="exceed the model's 96"):
        collect(conversation.answer())
    conversation.say("short")  # takes the place of the turn that had no answer
    collect(conversation.answer("written", Decoding(max_new=8)))


def test_the_model_is_not_told_the_form_where_it_may_choose(one_model: LoadedModel) -> None:
    vocab, turns = one_model.config.vocab, [ChatTurn("user", "hello")]
    either, written, spoken = (
        make_chat(vocab, one_model.tokenizer, turns, answer=form).ids for form in ("either", "written", "spoken")
    )
    assert either.tolist() == written.tolist() and len(spoken) > len(either)
    heard = [ChatTurn("user", "", codes_of(one_model, 3))]
    either, written = (make_chat(vocab, one_model.tokenizer, heard, answer=form).ids for form in ("either", "written"))
    assert len(written) > len(either)


def test_what_cannot_be_an_answer_is_refused(one_model: LoadedModel) -> None:
    one = prompt("text_lm", one_model.config.vocab, one_model.tokenizer, text="a")
    with pytest.raises(ConfigError, match="answer='sung': must be one of written, spoken, either"):
        answer(one_model, [one], "sung")


@pytest.mark.parametrize(
    ("option", "value"),
    [("repetition_penalty", 0), ("temperature", -0.1), ("top_k", -1), ("top_p", 0), ("top_p", 1.1)]
    + [(name, value) for name in ("repetition_penalty", "temperature", "top_p") for value in (math.inf, math.nan)],
)
def test_sampling_that_cannot_be_is_refused(option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{option}={value}: must"):
        Sampling(**{option: value})


def test_audio_has_no_penalty(one_model: LoadedModel) -> None:
    tts = prompt("tts", one_model.config.vocab, one_model.tokenizer, text="say")
    free, penalized = (
        answer(one_model, [tts], "spoken", Decoding(max_seconds=0.6, sampling=Sampling(repetition_penalty=penalty)))
        for penalty in (1.0, 50.0)
    )
    assert plain(free[0]) == plain(penalized[0])
