"""Speech recognizers that judge generated speech: audio in, words out.

Each is loaded when it is asked for, because each needs packages of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_most.audio.io import resample
from megatron_most.errors import ConfigError, DataError

NEMO = ".nemo"


class Recognizer(Protocol):
    """What an evaluation asks of a recognizer."""

    @property
    def name(self) -> str:
        """What results call it: all that decides about what it hears."""
        ...

    def transcribe(self, audio: np.ndarray, sample_rate: int) -> str:
        """The words said in ``audio`` (float ``[num_samples]`` in -1..1); empty when none are recognized.

        Raises:
            DataError: ``audio`` has another shape, holds values that are not finite, or is longer than is heard.
        """
        ...


def load_recognizer(path: str | Path, language: str) -> Recognizer:
    """A recognizer of any vocabulary. What is in ``path`` decides which; nothing is downloaded.

    Args:
        path: a folder that CTranslate2 converted a Whisper model to (``model.bin``), a Whisper or CTC model of
            transformers (``config.json``), or a NeMo model (a ``.nemo`` file).
        language: code of the language that a multilingual Whisper model hears, ``en`` for example.

    Raises:
        ConfigError: it is neither, or the package that reads it is not installed.
    """
    path = Path(path)
    if (path / "model.bin").is_file():
        from megatron_most.evaluation.recognizers.faster_whisper import FasterWhisperRecognizer

        return FasterWhisperRecognizer(path, language)
    if (path / "config.json").is_file():
        from megatron_most.evaluation.recognizers.hugging_face import TransformersRecognizer

        return TransformersRecognizer(path, language)
    if path.suffix == NEMO and path.is_file():
        from megatron_most.evaluation.recognizers.nemo import NemoRecognizer

        return NemoRecognizer(path)
    raise ConfigError(
        f"recognizer {path}: must be a folder with CTranslate2's model.bin or transformers' config.json,"
        " or a .nemo file"
    )


def package_of(path: str | Path | None) -> str:
    """The module that :func:`load_recognizer` needs for ``path``; without one, that of the closed vocabulary."""
    if path is None:
        return "pocketsphinx"
    if Path(path).suffix == NEMO:
        return "nemo"
    return "faster_whisper" if (Path(path) / "model.bin").is_file() else "transformers"


def heard(audio: np.ndarray, sample_rate: int, wanted: int, most_samples: int | None = None) -> np.ndarray:
    """``audio`` (float32, ``[num_samples]``) at the sample rate ``wanted``.

    Args:
        most_samples: what the recognizer hears, at ``wanted``; None: any length.

    Raises:
        DataError: see :meth:`Recognizer.transcribe`.
    """
    audio = np.asarray(audio, dtype=np.float32)
    if audio.ndim != 1:
        raise DataError(f"audio to hear must have shape [num_samples], got {list(audio.shape)}")
    if not np.isfinite(audio).all():
        raise DataError("audio to hear holds values that are not finite")
    if sample_rate != wanted:
        audio = resample(audio, sample_rate, wanted)
    if most_samples is not None and len(audio) > most_samples:
        raise DataError(
            f"audio to hear has {len(audio) / wanted:.1f} s, the recognizer hears {most_samples / wanted:.0f} s"
        )
    return audio


def digest(texts: Iterable[str]) -> str:
    """Twelve hexadecimal digits that tell recognizers apart."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:12]


def digest_of_files(files: Iterable[Path]) -> str:
    """:func:`digest` of names and sizes: large models are not read twice."""
    return digest(f"{file.name} {file.stat().st_size}" for file in sorted(files) if file.is_file())
