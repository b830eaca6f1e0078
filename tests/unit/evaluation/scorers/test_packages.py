"""Scorers by packages and models: a tiny x-vector model, and the real resemblyzer and DNSMOS on known speech."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector

from examples.quickstart.espeak import Espeak
from megatron_most.errors import ConfigError, DataError
from megatron_most.evaluation.scorers import Sound, load_scorer

SENTENCE, OTHER = "the old captain went home before the storm", "she bought seven green apples at the market"


def noise(seed: int, seconds: float = 1.0) -> Sound:
    return Sound(np.random.default_rng(seed).normal(0, 0.1, int(seconds * 16000)).astype(np.float32), 16000)


@pytest.fixture(scope="module")
def xvector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the form of microsoft/wavlm-base-plus-sv."""
    folder = tmp_path_factory.mktemp("xvector")
    torch.manual_seed(0)
    config = WavLMConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=[8, 8],
        conv_stride=[10, 8],
        conv_kernel=[10, 8],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        tdnn_dim=[16, 16],
        tdnn_kernel=[5, 1],
        tdnn_dilation=[1, 1],
        xvector_output_dim=12,
    )
    WavLMForXVector(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return folder


def test_similarity_is_the_cosine_of_embeddings(xvector: Path) -> None:
    scorer = load_scorer(f"xvector={xvector}")
    same = scorer.score(noise(0), noise(0))["speaker_similarity"]
    other = scorer.score(noise(0), noise(1))["speaker_similarity"]
    assert same == pytest.approx(1.0) and other < same
    one, two = (scorer.embedding(noise(seed).audio) for seed in (0, 1))
    assert other == pytest.approx(one @ two / np.linalg.norm(one) / np.linalg.norm(two))
    assert scorer.name.startswith(f"WavLMForXVector in {xvector.name} (") and "transformers" in scorer.name
    assert (scorer.compared_with, scorer.values) == ("voice", {"speaker_similarity": 0.0})
    again = scorer.score(noise(0), Sound(np.repeat(noise(0).audio, 2), 32000))["speaker_similarity"]
    assert again > 0.9, "resampled"


def test_sound_without_a_voice_cannot_be_compared(xvector: Path, tmp_path: Path) -> None:
    scorer = load_scorer(f"xvector={xvector}")
    with pytest.raises(DataError, match="silence has no voice"):
        scorer.score(Sound(np.zeros(16000), 16000), noise(0))
    with pytest.raises(DataError, match="silence has no voice"):
        scorer.score(noise(0), Sound(np.zeros(0), 16000))
    with pytest.raises(DataError, match="not finite"):
        scorer.score(Sound(np.full(100, np.nan), 16000), noise(0))
    with pytest.raises(DataError, match="0.00 s cannot be scored"):
        scorer.score(noise(0, 0.001), noise(0))
    with pytest.raises(ConfigError, match="not readable as an x-vector model"):
        load_scorer(f"xvector={tmp_path}")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("resemblyzer") is None, reason="pip install --no-deps resemblyzer webrtcvad-wheels"
)
def test_resemblyzer_tells_voices_apart() -> None:
    scorer, voice = load_scorer("resemblyzer"), Espeak()

    def said(text: str, **options: object) -> Sound:
        return Sound(voice.synthesize(text, **options), voice.sample_rate)

    same = scorer.score(said(SENTENCE), said(OTHER))["speaker_similarity"]
    other = scorer.score(said(SENTENCE), said(OTHER, voice="en-us+f3", pitch=80))["speaker_similarity"]
    assert other + 0.1 < same < 1.0
    assert scorer.score(said(SENTENCE), said(SENTENCE))["speaker_similarity"] == pytest.approx(1.0, abs=1e-5)
    assert scorer.name == "resemblyzer 0.1.4"
    with pytest.raises(DataError, match="silence has no voice"):
        scorer.score(Sound(np.zeros(16000), 16000), said(OTHER))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("speechmos") is None, reason="pip install speechmos")
def test_dnsmos_hears_noise() -> None:
    scorer, voice = load_scorer("dnsmos"), Espeak()
    clean = voice.synthesize(SENTENCE)
    noisy = clean + np.random.default_rng(0).normal(0, 0.1, len(clean))
    good, bad = (scorer.score(Sound(audio, voice.sample_rate), None) for audio in (clean, noisy))
    assert set(good) == set(scorer.values) and all(1 <= value <= 5 for value in (*good.values(), *bad.values()))
    assert all(good[name] > bad[name] for name in ("dnsmos_overall", "dnsmos_background", "dnsmos_p808"))
    assert (scorer.name, scorer.compared_with) == ("dnsmos of speechmos 0.0.1.1", None)
    with pytest.raises(DataError, match="no sound to score"):
        scorer.score(Sound(np.zeros(0), 16000), None)
