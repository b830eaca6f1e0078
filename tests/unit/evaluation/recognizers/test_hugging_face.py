"""Recognizers of transformers, on tiny random models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_most.errors import ConfigError, DataError
from megatron_most.evaluation.recognizers.hugging_face import TransformersRecognizer
from tests.unit.evaluation.ctc_model import SYMBOLS, write_ctc_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ctc")
    write_ctc_model(folder)
    return folder


def test_a_ctc_model_writes_what_its_logits_say(folder):
    recognizer = TransformersRecognizer(folder)
    audio = np.random.default_rng(0).normal(size=8000).astype(np.float32) * 0.1
    text = recognizer.transcribe(audio, 8000)
    assert text == recognizer.transcribe(audio, 8000) and set(text) <= set("ABCDEFG ")
    letter = SYMBOLS.index("C")
    with torch.no_grad():
        recognizer._model.lm_head.bias[letter] += 100
    assert recognizer.transcribe(audio, 8000) == "C"
    assert recognizer.name.startswith(f"HubertForCTC in {folder.name} (")


def test_what_no_recognizer_hears_fails(folder, tmp_path):
    recognizer = TransformersRecognizer(folder)
    assert recognizer.transcribe(np.zeros(0), 16000) == ""
    for audio in (np.zeros((2, 100)), np.array([0.0, np.nan])):
        with pytest.raises(DataError, match="audio to hear"):
            recognizer.transcribe(audio, 16000)
    recognizer._most_samples = 16000  # as Whisper's 30 s
    with pytest.raises(DataError, match="has 1.5 s, the recognizer hears 1 s"):
        recognizer.transcribe(np.zeros(12000), 8000)
    with pytest.raises(ConfigError, match="config.json: no such file"):
        TransformersRecognizer(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    with pytest.raises(ConfigError, match="not readable as a speech recognizer"):
        TransformersRecognizer(tmp_path)
