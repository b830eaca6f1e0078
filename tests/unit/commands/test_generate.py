"""``most generate`` says what it wrote; nothing is loaded here."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from megatron_most import inference
from megatron_most.commands import generate


@pytest.fixture
def model(monkeypatch):
    """A model that answers at once, with 3 frames of 800 samples, or the number of its input's samples."""
    codec = SimpleNamespace(
        sample_rate=16000,
        encode=lambda waveform: np.zeros((len(waveform), 1)),
        decode=lambda codes: np.zeros(800 * len(codes), dtype=np.float32),
    )
    monkeypatch.setattr(generate, "require", lambda *modules: None)
    monkeypatch.setattr(
        inference, "load_for_generation", lambda *arguments: SimpleNamespace(codec=codec), raising=False
    )
    monkeypatch.setattr(inference, "speak", lambda *arguments, **options: [np.zeros((3, 1))], raising=False)
    answers = lambda model, codes, *arguments, **options: [f"{len(one)} samples" for one in codes]  # noqa: E731
    monkeypatch.setattr(inference, "transcribe", answers, raising=False)


def test_speech_is_named_with_its_length(model, tmp_path, capsys):
    pytest.importorskip("soundfile")
    wav = tmp_path / "speech.wav"
    generate.main(["--checkpoint", "c", "--task", "tts", "--input", "a", "fox", "--output", str(wav)])
    assert wav.exists() and capsys.readouterr().out == f"{wav}: 0.15 s of speech at 16000 Hz\n"


def test_transcripts_are_printed_or_their_file_is_named(model, tmp_path, capsys):
    soundfile = pytest.importorskip("soundfile")
    recordings = [str(tmp_path / f"{number}.wav") for number in (1, 2)]
    for path in recordings:
        soundfile.write(path, np.full(1600, 0.1), 16000)
    arguments = ["--checkpoint", "c", "--task", "asr", "--input"]
    generate.main([*arguments, *recordings])
    assert capsys.readouterr().out == "1600 samples\n1600 samples\n"
    output = tmp_path / "text.txt"
    generate.main([*arguments, *recordings, "--output", str(output)])
    assert capsys.readouterr().out == f"{output}: 2 transcripts\n"
    generate.main([*arguments, recordings[0], "--output", str(output)])
    assert capsys.readouterr().out == f"{output}: 1 transcript\n"
    assert output.read_text() == "1600 samples\n"
