"""The studio's codec: what its training compares, its schedule, and what a codec is refused for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from examples.quickstart.codec.crops import CropSampler
from examples.studio.codec import check_codec, train_codec

RATE = 16000
SECOND = np.arange(RATE) / RATE


def tone(hertz: float) -> torch.Tensor:
    return torch.from_numpy(np.sin(2 * np.pi * hertz * SECOND).astype(np.float32))[None]


def test_the_low_pass_keeps_the_pitch_of_a_voice_and_nothing_above():
    low = train_codec.LowPass(RATE)
    assert low(tone(120)).shape == (1, RATE // train_codec.LOW_STEP)
    assert low(tone(120))[0, 100:].abs().max() == pytest.approx(1.0, abs=0.03)
    assert low(tone(1500))[0, 100:].abs().max() < 0.01


def test_a_phase_that_is_off_costs_and_no_magnitude_shows_it():
    low = train_codec.LowPass(RATE)
    wanted = low(tone(120))
    assert low.loss(wanted, wanted) == 0
    assert low.loss(low(-tone(120)), wanted) == pytest.approx(2.0, abs=0.01)


def test_the_head_reads_each_frame_from_its_own_code():
    head = train_codec.WaveHead(32, 640)
    latents = torch.randn(2, 32, 5)
    samples = head(latents)
    assert samples.shape == (2, 5 * 640 // train_codec.LOW_STEP)
    latents[:, :, 3] = 0
    changed = (head(latents) != samples).reshape(2, 5, -1).any(2)
    assert changed.tolist() == [[False, False, False, True, False]] * 2


def test_the_rate_warms_up_by_steps_and_falls_with_time():
    rates = [train_codec.lr_at(1e-3, step, 0.0) for step in (0, 49, 99, 500)]
    assert rates == pytest.approx([1e-5, 5e-4, 1e-3, 1e-3])
    assert [train_codec.lr_at(1.0, 1000, part) for part in (0.5, 1.0, 1.5)] == pytest.approx([0.505, 0.01, 0.01])


def test_the_encoder_hears_what_the_decoder_has_to_say():
    pool = [np.sin(np.arange(20000) / 7).astype(np.float32)]
    options = {"num_samples": 4000, "template_share": 1.0, "max_shift": 0, "max_noise": 0.0, "seed": 1}
    heard, wanted = CropSampler(pool, [], **options, inverts=False).batch(8)
    assert torch.equal(heard, wanted)
    heard, wanted = CropSampler(pool, [], **options).batch(8)
    assert not torch.equal(heard, wanted) and torch.equal(heard.abs(), wanted.abs())


GOOD = {"roundtrip_wer": 0.05, "voiced_frames_kept": 0.9, "f0_correlation": 0.9}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"roundtrip_wer": 0.1}, ["WER after the codec is 10.0%, not below 10%"]),
        ({"voiced_frames_kept": 0.07}, ["voiced_frames_kept is 0.07, not 0.70 or more"]),
        ({"f0_correlation": -0.1}, ["f0_correlation is -0.10, not 0.60 or more"]),
    ],
)
def test_a_codec_is_refused_for_what_it_misses(change, said):
    assert check_codec.missed(GOOD | change, 0.1, 0.7, 0.6) == said


def test_a_voice_keeps_its_pitch_and_a_whisper_does_not():
    glide = 2 * np.pi * np.cumsum(np.linspace(90, 140, RATE)) / RATE
    voice = sum(np.sin(n * glide) / n for n in range(1, 12)).astype(np.float32) * 0.2
    kept = check_codec.pitch([voice], [voice * 0.5], RATE)
    assert kept["voiced_frames_kept"] > 0.95 and kept["f0_correlation"] > 0.95
    whisper = np.random.default_rng(0).normal(scale=0.2, size=RATE).astype(np.float32)
    lost = check_codec.pitch([voice], [whisper], RATE)
    assert lost["voiced_frames_kept"] < 0.3
