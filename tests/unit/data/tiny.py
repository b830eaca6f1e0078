"""Tiny codecs, tokenizers and datasets for the tests of the data pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile

from megatron_most.config import RunConfig
from megatron_most.config.load import build_config
from megatron_most.data.indexed import DatasetWriter, TokenDataset
from megatron_most.data.tasks import make_document
from megatron_most.vocab import VocabLayout

CODEBOOKS, CODEBOOK_SIZE, TEXT_VOCAB = 3, 50, 40
LAYOUTS = ("frame", "flat")


def layout(name: str = "frame") -> VocabLayout:
    return VocabLayout(TEXT_VOCAB, CODEBOOKS, CODEBOOK_SIZE, name)


class LetterTokenizer:
    """Letters a to z and the space as ids 3 to 29; anything else vanishes."""

    vocab_size, bos_id, eos_id, pad_id, fingerprint = 30, 1, 2, 0, "letters"

    def encode(self, text: str) -> list[int]:
        return [
            29 if letter == " " else ord(letter) - 94 for letter in text.lower() if letter == " " or letter.isalpha()
        ]

    def decode(self, ids) -> str:
        return "".join(" " if token == 29 else chr(token + 94) for token in ids if token > 2)


class LoudnessCodec:
    """A codec without NeMo: 100 samples a frame, codes from the samples' magnitudes."""

    name, fingerprint = "loudness", "0" * 64
    num_codebooks, codebook_size, sample_rate, samples_per_frame = CODEBOOKS, CODEBOOK_SIZE, 8000, 100
    frame_rate = 80.0

    def encode(self, waveform: np.ndarray) -> np.ndarray:
        frames = np.pad(waveform, (0, -len(waveform) % 100)).reshape(-1, 100)
        loudness = np.abs(frames).mean(axis=1)
        return np.stack([(loudness * scale).astype(np.int64) % CODEBOOK_SIZE for scale in (10, 1000, 100000)])

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return np.repeat(codes[0] / 10, 100).astype(np.float32)


def random_codes(num_frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CODEBOOK_SIZE, (CODEBOOKS, num_frames))


def write_dataset(
    prefix: Path, task: str, num_documents: int, *, layout_name: str = "frame", seed: int = 0, provenance=None
) -> TokenDataset:
    """Documents of random length; the text of document i spells i, so that every document is unlike the others."""
    generator = np.random.default_rng(seed)
    vocab = layout(layout_name)
    with DatasetWriter(prefix, task, vocab) as writer:
        for index in range(num_documents):
            codes = None if task == "text_lm" else random_codes(int(generator.integers(1, 7)), seed=index)
            text = "".join("abcdefghij"[int(digit)] for digit in str(index)) + "z" * int(generator.integers(0, 5))
            writer.add(make_document(task, vocab, LetterTokenizer(), text=text, codes=codes))
        writer.commit(provenance or {})
    return TokenDataset(prefix)


def write_wavs(folder: Path, num_files: int, seconds: float = 0.2) -> list[dict]:
    """Noise files and their manifest entries."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for index in range(num_files):
        samples = np.random.default_rng(index).uniform(-0.9, 0.9, round(8000 * seconds) + 37 * (index % 5))
        soundfile.write(folder / f"{index}.wav", samples, 8000)
        entries.append(
            {"audio_filepath": f"{folder.name}/{index}.wav", "duration": len(samples) / 8000, "text": f"w{index}"}
        )
    return entries


def run_config(train: list[tuple[Path, float]], validation: list[Path] = (), **overrides) -> RunConfig:
    """A configuration for the tiny layout; ``overrides`` go to ``data``, ``training`` or the top by their names."""
    values: dict = {
        "vocab": layout(overrides.pop("layout_name", "frame")).to_dict(),
        "data": {
            "train": [{"path": str(path), "weight": weight} for path, weight in train],
            "validation": [{"path": str(path)} for path in validation],
            "seq_length": 64,
        },
        "training": {"micro_batch_size": 1, "global_batch_size": 8},
    }
    for name, value in overrides.items():
        if name in ("seq_length", "packing", "document_multiple", "audio_frame_dropout"):
            values["data"][name] = value
        elif name in ("micro_batch_size", "global_batch_size", "eval_batches"):
            values["training"][name] = value
        else:
            values[name] = value
    return build_config("test", values)
