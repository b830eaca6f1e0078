"""Recognizers of transformers, on tiny random models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
)

from megatron_most.errors import ConfigError, DataError
from megatron_most.evaluation.recognizers.hugging_face import TransformersRecognizer

SYMBOLS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFG"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ctc")
    (folder / "vocab.json").write_text(json.dumps({symbol: place for place, symbol in enumerate(SYMBOLS)}))
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    convolutions = {"conv_dim": [8, 8], "conv_stride": [10, 8], "conv_kernel": [10, 8]}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    config = Wav2Vec2Config(
        vocab_size=len(SYMBOLS),
        num_feat_extract_layers=2,
        feat_extract_norm="layer",
        **sizes,
        **convolutions,
        **positions,
    )
    Wav2Vec2ForCTC(config).save_pretrained(folder)
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
    assert recognizer.name.startswith(f"Wav2Vec2ForCTC in {folder.name} (")


def test_what_no_recognizer_hears_fails(folder, tmp_path):
    recognizer = TransformersRecognizer(folder)
    assert recognizer.transcribe(np.zeros(0), 16000) == ""
    for audio in (np.zeros((2, 100)), np.array([0.0, np.nan])):
        with pytest.raises(DataError, match="audio to recognize"):
            recognizer.transcribe(audio, 16000)
    recognizer._most_samples = 16000  # as Whisper's 30 s
    with pytest.raises(DataError, match="has 1.5 s, the recognizer hears 1 s"):
        recognizer.transcribe(np.zeros(12000), 8000)
    with pytest.raises(ConfigError, match="config.json: no such file"):
        TransformersRecognizer(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    with pytest.raises(ConfigError, match="not readable as a speech recognizer"):
        TransformersRecognizer(tmp_path)
