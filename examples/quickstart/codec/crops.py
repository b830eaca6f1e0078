"""Training material for the codec: random crops of the template corpus and of broader espeak-ng speech."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile
import torch

from examples.quickstart.codec.broad_speech import broad_rows
from examples.quickstart.espeak import Espeak
from examples.quickstart.make_corpus import render
from megatron_most.errors import DataError


def template_waveforms(corpus: Path) -> list[np.ndarray]:
    """The training split of a corpus made by make_corpus.py: float32 waveforms at 16 kHz."""
    manifest = corpus / "train.jsonl"
    if not manifest.exists():
        raise DataError(f"no manifest {manifest}: make the corpus first (examples/quickstart/make_corpus.py)")
    paths = [json.loads(line)["audio_filepath"] for line in manifest.read_text().splitlines()]
    return [soundfile.read(path, dtype="float32")[0] for path in paths]


def broad_waveforms(count: int, seed: int) -> list[np.ndarray]:
    """``count`` utterances of varied text in varied voices: float32 waveforms at 16 kHz."""
    engine = Espeak()
    return [render(engine, row) for row in broad_rows(count, seed)]


class CropSampler:
    """Draws pairs of crops: what the encoder hears and what the decoder must say.

    The heard crop is the wanted one shifted by up to ``max_shift`` samples, inverted every other time (unless
    ``inverts`` is false), with white noise of up to ``max_noise``. Levels vary by -4.4 to +1.6 dB.
    """

    def __init__(
        self,
        template: list[np.ndarray],
        broad: list[np.ndarray],
        *,
        num_samples: int,
        template_share: float,
        max_shift: int,
        max_noise: float,
        seed: int,
        inverts: bool = True,
    ):
        self.num_samples = num_samples
        self.template_share, self.max_shift, self.max_noise = template_share, max_shift, max_noise
        self.signs = (-1, 1) if inverts else (1, 1)
        self._rng = np.random.default_rng(seed)
        # Silence around each utterance: the codec must learn it, and short utterances must fill a crop.
        margin = num_samples // 3
        self._pools = [[np.pad(waveform, margin) for waveform in pool] for pool in (template, broad)]

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Heard and wanted audio, both float32 ``[size, num_samples]`` in -1..1."""
        heard, wanted = zip(*(self._pair() for _ in range(size)), strict=True)
        return torch.from_numpy(np.stack(heard)), torch.from_numpy(np.stack(wanted))

    def _pair(self) -> tuple[np.ndarray, np.ndarray]:
        rng = self._rng
        pool = self._pools[0 if rng.random() < self.template_share else 1]
        waveform = pool[rng.integers(len(pool))]
        span = self.num_samples + 2 * self.max_shift
        start = rng.integers(max(1, len(waveform) - span))
        crop = waveform[start : start + span] * rng.uniform(0.6, 1.2)
        crop = np.pad(crop, (0, span - len(crop)))
        shift = rng.integers(2 * self.max_shift + 1)
        heard = crop[shift : shift + self.num_samples] * rng.choice(self.signs)
        heard = heard + rng.normal(scale=self.max_noise * rng.random(), size=self.num_samples)
        wanted = crop[self.max_shift : self.max_shift + self.num_samples]
        return np.clip(heard, -1, 1).astype(np.float32), np.clip(wanted, -1, 1).astype(np.float32)
