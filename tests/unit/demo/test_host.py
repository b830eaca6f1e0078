"""What visitors of the page are answered: as by the model itself, inside the limits, and remembered apart."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_most.commands import generate
from megatron_most.conversion.model_card import TrainingData
from megatron_most.data.building.tasks import prompt
from megatron_most.demo import host as demo_host
from megatron_most.demo.host import TASKS, TAUGHT_BY, Exchange, Host, Limits, Request, tasks_of
from megatron_most.demo.messages import kept, messages_of, pcm, stopped
from megatron_most.errors import DataError, MostError
from megatron_most.inference import Answer, Decoding, Sampling, answer, answers
from megatron_most.inference.loading import LoadedModel, no_codec
from tests.unit.inference.test_answers import load

soundfile = pytest.importorskip("soundfile")
DECODING = Decoding(max_new=8, max_seconds=0.8, sampling=Sampling(temperature=1.0, seed=3))
LIMITS = Limits(seconds=2.0, characters=40, upload_mib=1, max_new=20, max_seconds=2.0, visitors=2)


@pytest.fixture(scope="module")
def model() -> Iterator[LoadedModel]:
    yield from load(vocab__layout="frame_delay")


@pytest.fixture
def host(model: LoadedModel) -> Host:
    return Host(model, tuple(TASKS), LIMITS)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "question.wav"
    soundfile.write(path, np.sin(np.arange(4000) / 9) * 0.3, 8000)
    return path


def asked(host: Host, visitor: str = "anna", decoding: Decoding = DECODING, **request: Any) -> list[Exchange]:
    """The exchange after each step."""
    steps = host.answer(visitor, Request(**request), decoding)
    return [dataclasses.replace(one, parts=list(one.parts), notes=list(one.notes)) for one in steps]


def test_the_tasks_are_those_of_most_generate() -> None:
    assert set(TASKS) == set(generate.TASKS) and set(TAUGHT_BY.values()) == set(TASKS)


def test_a_transcript_comes_piece_by_piece_and_is_the_models(host: Host, model: LoadedModel, recording: Path) -> None:
    steps = asked(host, task="asr", recording=recording)
    assert steps[0].parts == [] and steps[-1].is_over and len(steps) > 2
    waveform = host._read(recording)
    assert len(waveform) == 200  # half a second at the codec's rate
    whole = answer(
        model,
        [prompt("asr", model.config.vocab, model.tokenizer, codes=model.codec.encode(waveform))],
        "written",
        DECODING,
    )
    assert steps[-1].parts == [whole[0].text]


def some_speech(model: LoadedModel) -> tuple[Decoding, Answer]:
    """How the random model speaks for more than a frame or two, and what it says."""
    document = prompt("tts", model.config.vocab, model.tokenizer, text="good day")
    for seed in range(99):
        decoding = Decoding(8, 2.0, Sampling(temperature=1.0, seed=seed))
        [whole] = answer(model, [document], "spoken", decoding)
        if whole.codes is not None and len(whole.codes) > 2:
            return decoding, whole
    raise AssertionError("the model says little")


def test_speech_comes_chunk_by_chunk_and_is_the_sound_of_the_whole(
    host: Host, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding, whole = some_speech(model)
    monkeypatch.setattr(answers, "_CHUNK_SECONDS", 0.1)  # a frame
    monkeypatch.setattr(answers, "_PIECE_POSITIONS", 1)
    steps = asked(host, decoding=decoding, task="tts", text="good day")
    chunks = [step.new_sound for step in steps if step.new_sound is not None]
    expected = model.codec.decode(whole.codes)
    assert len(chunks) > 1 and np.allclose(np.concatenate(chunks), expected, atol=1e-5)
    [sound] = steps[-1].parts
    assert np.allclose(sound, expected, atol=1e-5) and steps[-1].new_sound is None


def test_a_chat_remembers_its_visitor_and_forgets_the_one_that_was_silent_longest(host: Host, recording: Path) -> None:
    asked(host, "anna", task="chat", text="good day")
    last = asked(host, "anna", task="chat", recording=recording, form="spoken", system="")[-1]
    assert any(isinstance(part, np.ndarray) for part in last.parts)
    [(_, talk)] = host._visits.values()
    assert [turn.role for turn in talk.turns] == ["user", "assistant"] * 2
    assert [turn.codes is None for turn in talk.turns] == [True, True, False, False]
    asked(host, "ben", task="chat", text="hello")
    asked(host, "anna", task="chat", text="again")
    asked(host, "cleo", task="chat", text="hello")
    assert list(host._visits) == ["anna", "cleo"]
    assert asked(host, "anna", task="chat", text="x", system="Be brief.")[-1].notes[0].startswith("Another system")
    host.forget("anna")
    assert list(host._visits) == ["cleo"]


def test_what_goes_on_may_begin_in_writing_and_in_sound(host: Host, recording: Path) -> None:
    steps = asked(host, task="continue", text="once", recording=recording, form="either")
    assert steps[-1].is_over and steps[-1].parts


def test_what_is_said_aloud_is_written_down_where_the_model_can(
    host: Host, model: LoadedModel, recording: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_host, "transcribe", lambda model, codes, max_new: [f"{len(codes[0])} frames"])
    last = asked(host, task="chat", recording=recording, form="spoken", transcribes=True)[-1]
    assert (last.heard, last.transcript) == ("5 frames", f"{len(last.parts[0]) // 40} frames")
    deaf = Host(model, ("chat",), LIMITS)
    last = asked(deaf, task="chat", recording=recording, form="spoken", transcribes=True)[-1]
    assert not last.heard and not last.transcript


def test_an_answer_at_its_limit_and_turns_that_no_longer_fit_are_told(host: Host) -> None:
    steps = [asked(host, task="chat", text="abcdefghijklmnopqrstuvwxyz")[-1] for _ in range(4)]
    assert any("reached its limit" in note for step in steps for note in step.notes)
    assert any("no longer fit" in note for step in steps for note in step.notes)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"task": "sing"}, "task sing: this model offers chat, asr, tts, continue"),
        ({"task": "chat"}, "write something, or record or upload it"),
        ({"task": "asr", "text": "a"}, "record or upload something to transcribe"),
        ({"task": "tts", "text": " \n"}, "write the text to speak"),
        ({"task": "tts", "text": "a" * 41}, "the text: has 41 characters; at most 40 are read"),
        ({"task": "chat", "text": "a", "system": "a" * 41}, "the system message: has 41 characters"),
        ({"task": "chat", "text": "a", "recording": "question"}, "write a text or give a recording, not both"),
        ({"task": "asr", "recording": "long"}, "the recording: is longer than 2 s"),
        ({"task": "asr", "recording": "huge"}, "the recording: is larger than 1 MiB"),
        ({"task": "asr", "recording": "picture"}, "the recording: not readable as audio: "),
        ({"task": "asr", "recording": "empty"}, "the recording: "),
        ({"task": "chat", "text": "a", "decoding": Decoding(21, 1.0)}, "max new tokens: is 21; must be above 0"),
        ({"task": "chat", "text": "a", "decoding": Decoding(2, 9.0)}, "max seconds: is 9.0; must be above 0"),
        ({"task": "chat", "text": "a", "decoding": Decoding(2, float("nan"))}, "max seconds: is nan; must be above 0"),
    ],
)
def test_what_breaks_a_limit_is_one_line_and_the_next_request_is_answered(
    host: Host, recording: Path, tmp_path: Path, request_: dict[str, Any], message: str
) -> None:
    files = {name: tmp_path / f"{name}.wav" for name in ("long", "huge", "picture", "empty")}
    soundfile.write(files["long"], np.zeros(8000 * 3), 8000)
    files["huge"].write_bytes(bytes((1 << 20) + 1))
    files["picture"].write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(500))
    files["empty"].write_bytes(b"")
    files["question"] = recording
    if "recording" in request_:
        request_ = {**request_, "recording": files[request_["recording"]]}
    with pytest.raises(MostError) as caught:
        asked(host, **request_)
    line = str(caught.value)
    assert line.startswith(message) and "\n" not in line and str(tmp_path) not in line
    assert asked(host, task="chat", text="good day")[-1].is_over


def test_a_model_without_a_codec_writes_and_says_that_it_does_not_hear(model: LoadedModel, recording: Path) -> None:
    silent = dataclasses.replace(model, codec=no_codec("text-only"))
    assert set(tasks_of(silent, has_codec=False)) == {"chat", "continue"}
    host = Host(silent, ("chat", "continue"), LIMITS, has_codec=False)
    assert asked(host, task="chat", text="good day", transcribes=True)[-1].is_over
    for request in ({"recording": recording}, {"text": "a", "form": "spoken"}):
        with pytest.raises(DataError, match="loaded without a codec"):
            asked(host, task="chat", **request)


@pytest.mark.parametrize(
    ("taught", "offered"),
    [
        (("asr", "tts"), ("asr", "tts")),
        (("text_lm", "chat"), ("chat", "continue")),
        (("interleaved",), ("continue",)),
        (("asr", None), ("chat", "asr", "tts", "continue")),
        ((), ("chat", "asr", "tts", "continue")),
    ],
)
def test_the_page_offers_what_the_datasets_taught(model: LoadedModel, monkeypatch, taught: Any, offered: Any) -> None:
    data = [TrainingData("d", task, 1, Counter()) for task in taught]
    monkeypatch.setattr(demo_host, "training_data", lambda metadata: data)
    trained = dataclasses.replace(model, metadata=SimpleNamespace())
    assert tasks_of(trained, has_codec=True) == offered
    full = dataclasses.replace(model.config.vocab, text_vocab_size=model.tokenizer.vocab_size)
    crowded = dataclasses.replace(trained, config=SimpleNamespace(vocab=full))
    assert tasks_of(crowded, has_codec=True) == tuple(task for task in offered if task != "chat")


def test_visitors_of_several_threads_are_answered_as_alone(host: Host) -> None:
    """Step by step in turns: none waits for the other's whole answer, and none changes it."""
    texts = {"anna": "one", "ben": "two two"}
    alone = {name: asked(host, name, task="tts", text=text)[-1].parts for name, text in texts.items()}
    found: dict[str, Any] = {}

    def talk(name: str) -> None:
        found[name] = asked(host, name, task="tts", text=texts[name])[-1].parts

    threads = [threading.Thread(target=talk, args=(name,)) for name in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, parts in alone.items():
        assert np.array_equal(parts[0], found[name][0])


def test_an_exchange_is_two_messages_with_the_transcript_beside_the_sound() -> None:
    exchange = Exchange("", Path("q.wav"), sample_rate=400)
    assert messages_of(exchange, save=str) == [
        {"role": "user", "content": [{"path": "q.wav"}]},
        {"role": "assistant", "content": ["…"]},
    ]
    exchange.add("so ")
    exchange.add("be it")
    exchange.add(np.zeros(300))
    exchange.add(np.zeros(300))
    growing = messages_of(exchange, save=str)
    assert growing[1]["content"] == ["so be it", "speaking … 1.5 s"]
    assert stopped(growing)[1]["content"] == ["so be it", "stopped while speaking … 1.5 s"]
    exchange.heard, exchange.transcript, exchange.is_over = "what?", "well", True
    said, answered = messages_of(exchange, save=lambda waveform: f"{len(waveform)}.wav")
    assert said["content"] == [{"path": "q.wav"}, "The model hears: what?"]
    assert answered["content"] == ["so be it", {"path": "600.wav"}, "The model hears itself say: well"]
    assert stopped([]) == []
    assert kept([answered])[0]["content"][1] == "speech that is no longer kept"
    assert kept([{**answered, "content": [{"path": __file__}, "a"]}])[0]["content"] == [{"path": __file__}, "a"]


def test_chunks_are_16_bit_samples() -> None:
    import base64

    samples = np.frombuffer(base64.b64decode(pcm(np.array([0.0, 0.5, -1.0, 7.0]))), "<i2")
    assert samples.tolist() == [0, 16384, -32767, 32767]


def test_nothing_is_said_of_an_answer_that_is_empty(host: Host, monkeypatch) -> None:
    def nothing(*arguments: Any) -> Iterator[Any]:
        yield from ()
        return Answer(())

    monkeypatch.setattr(demo_host, "respond", nothing)
    assert asked(host, task="continue", text="a")[-1].notes == ["The model answered nothing."]
