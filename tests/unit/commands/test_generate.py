"""``most generate`` says what it wrote; nothing is loaded here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_most import inference
from megatron_most.commands import generate
from megatron_most.inference import Answer


class Talker:
    """A conversation with someone who says back what was said, in capitals, or as 3 frames of sound."""

    made: list[Talker] = []

    def __init__(self, model: Any, system: str | None) -> None:
        self.system, self.num_forgotten, self.said = system, 0, []
        Talker.made.append(self)

    def say(self, turn: str | np.ndarray) -> None:
        self.said.append(turn)

    def answer(self, form: str, decoding: Any) -> Iterator[Any]:
        turn = self.said[-1] if isinstance(self.said[-1], str) else f"{len(self.said[-1])} samples"
        self.decoding = decoding
        if form == "spoken":
            yield np.zeros(1600, np.float32)
            yield np.zeros(800, np.float32)
            return Answer((np.zeros((3, 1)),), at_limit=True)
        for word in turn.upper().split():
            yield word + " "
        return Answer((turn.upper(),))


@pytest.fixture
def model(monkeypatch):
    """A model that answers at once, with 3 frames of 800 samples, or the number of its input's samples."""
    codec = SimpleNamespace(
        sample_rate=16000,
        encode=lambda waveform: np.zeros((len(waveform), 1)),
        decode=lambda codes: np.zeros(800 * len(codes), dtype=np.float32),
    )
    loaded: dict[str, Any] = {}

    def load(*arguments: Any, **options: Any) -> SimpleNamespace:
        loaded.update(options)
        return SimpleNamespace(codec=codec)

    monkeypatch.setattr(generate, "require", lambda *modules: None)
    monkeypatch.setattr(inference, "load_for_generation", load)
    monkeypatch.setattr(inference, "speak", lambda *arguments, **options: [np.zeros((3, 1))])
    answers = lambda model, codes, *arguments, **options: [f"{len(one)} samples" for one in codes]  # noqa: E731
    monkeypatch.setattr(inference, "transcribe", answers)
    monkeypatch.setattr(inference, "Conversation", Talker)
    monkeypatch.setattr(Talker, "made", [])
    return loaded


@pytest.fixture
def recording(tmp_path: Path) -> str:
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "question.wav", np.full(1600, 0.1), 16000)
    return str(tmp_path / "question.wav")


def run(*arguments: object) -> None:
    generate.main(["--checkpoint", "c", "--task", *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit):
        run(*arguments)
    return capsys.readouterr().err


def test_speech_is_named_with_its_length(model, tmp_path, capsys):
    pytest.importorskip("soundfile")
    wav = tmp_path / "speech.wav"
    run("tts", "--input", "a", "fox", "--output", wav)
    assert wav.exists() and capsys.readouterr().out == f"{wav}: 0.15 s of speech at 16000 Hz\n"


def test_transcripts_are_printed_or_their_file_is_named(model, tmp_path, capsys):
    soundfile = pytest.importorskip("soundfile")
    recordings = [str(tmp_path / f"{number}.wav") for number in (1, 2)]
    for path in recordings:
        soundfile.write(path, np.full(1600, 0.1), 16000)
    run("asr", "--input", *recordings)
    assert capsys.readouterr().out == "1600 samples\n1600 samples\n"
    output = tmp_path / "text.txt"
    run("asr", "--input", *recordings, "--output", output)
    assert capsys.readouterr().out == f"{output}: 2 transcripts\n"
    run("asr", "--input", recordings[0], "--output", output)
    assert capsys.readouterr().out == f"{output}: 1 transcript\n"
    assert output.read_text() == "1600 samples\n"


def test_a_chat_prints_text_and_writes_sound(model, recording, tmp_path, capsys):
    run("chat", "--input", "good day", "--system", "be kind", "--repetition-penalty", 1.2)
    assert capsys.readouterr().out == "GOOD DAY \n" and model["needs_codec"] is False
    [talker] = Talker.made
    assert talker.system == "be kind" and talker.decoding.sampling.repetition_penalty == 1.2
    run("chat", "--input", recording)
    assert capsys.readouterr().out == "1600 SAMPLES \n" and model["needs_codec"] is True
    wav = tmp_path / "a.wav"
    run("chat", "--input", "one", "--answer", "spoken", "--output", wav)
    said = capsys.readouterr()
    assert said.out == f"[{wav}: 0.15 s of speech]\n" and "the answer reached its limit" in said.err
    run("chat", "--input", "one", recording, "--answer", "spoken", "--output", wav)
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"[{tmp_path}/a_{number}.wav" for number in (1, 2)
    ]
    assert sorted(path.name for path in tmp_path.glob("a*.wav")) == ["a.wav", "a_1.wav", "a_2.wav"]


def test_a_chat_in_the_terminal(model, recording, monkeypatch, capsys):
    lines = iter(["hello", "", "/new", recording, "/what", "absent.wav", "again", "/quit", "never"])
    monkeypatch.setattr("builtins.input", lambda asked: next(lines))
    run("chat", "--interactive")
    said = capsys.readouterr()
    assert said.out == "HELLO \n1600 SAMPLES \nAGAIN \n"
    assert said.err.count("/quit ends") == 2 and "error: absent.wav: no such audio file" in said.err
    assert [len(talker.said) for talker in Talker.made] == [1, 2]
    monkeypatch.setattr("builtins.input", lambda asked: (_ for _ in ()).throw(EOFError))
    run("chat", "--interactive")


def test_what_continues_text_is_text_and_what_continues_sound_is_sound(model, recording, tmp_path, monkeypatch, capsys):
    asked: list[Any] = []

    def respond(model: Any, task: str, pieces: Any, form: str, decoding: Any) -> Iterator[Any]:
        asked.append((task, *map(type, pieces), form))
        yield "on and on\n" if form == "written" else np.zeros(800, np.float32)
        return Answer(())

    monkeypatch.setattr(inference, "respond", respond)
    wav = tmp_path / "on.wav"
    run("continue", "--input", recording, "once")
    run("continue", "--input", "once", recording, "--output", wav)
    assert asked == [("continue", np.ndarray, str, "written"), ("continue", str, np.ndarray, "spoken")]
    assert capsys.readouterr().out == f"on and on\n[{wav}: 0.05 s of speech]\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chat",), "--input: is required with --task chat"),
        (("chat", "--input", "a", "--answer", "spoken"), "--output: is required with --answer spoken"),
        (("chat", "--interactive", "--answer", "either"), "--output: is required with --answer either"),
        (("chat", "--interactive", "--input", "a"), "--input: --interactive reads the turns from the terminal"),
        (("tts", "--interactive"), "--interactive: is for --task chat, not tts"),
        (("asr", "--input", "a.wav", "--answer", "written"), "--answer: is for --task chat and continue, not asr"),
        (("continue", "--input", "a", "--system", "b"), "--system: is for --task chat, not continue"),
        (("chat", "--input", "absent.wav"), "absent.wav: no such audio file"),
        (("chat", "--input", "absent.txt"), "absent.txt: no such file"),
        (
            ("chat", "--input", "a", "--repetition-penalty", "0"),
            "repetition_penalty=0.0: must be a number",
        ),
        (("chat", "--input", "a", "--max-seconds", "0"), "--max-seconds=0.0: must be greater than 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(model, capsys, arguments, message):
    assert message in refused(capsys, *arguments)


def test_one_terminal_is_not_for_many_ranks(model, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--interactive: is for one process" in refused(capsys, "chat", "--interactive")
