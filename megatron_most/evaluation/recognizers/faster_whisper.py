"""A recognizer of any vocabulary: a Whisper model that CTranslate2 converted, through faster-whisper."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_most.errors import ConfigError, first_line
from megatron_most.evaluation.recognizers import digest_of_files, heard
from megatron_most.extras import require

SAMPLE_RATE = 16000
BEAM_SIZE = 5


class FasterWhisperRecognizer:
    """Transcripts with faster-whisper's beam of 5, without its random retries, on this process's device.

    Args:
        folder: the converted model with its ``tokenizer.json``. Nothing is downloaded.
        language: its code. English models know no other.

    Raises:
        ConfigError: faster-whisper is not installed or cannot read the folder, or the model does not know the language.
    """

    def __init__(self, folder: str | Path, language: str) -> None:
        require("faster_whisper")
        import faster_whisper

        folder = Path(folder)
        # Without this file faster-whisper would ask a hub for one.
        if not (folder / "tokenizer.json").is_file():
            raise ConfigError(
                f"recognizer {folder}: has no tokenizer.json; convert it with --copy_files tokenizer.json"
            )
        on_gpu = torch.cuda.is_available()
        try:
            self._model: Any = faster_whisper.WhisperModel(
                str(folder),
                device="cuda" if on_gpu else "cpu",
                compute_type="float16" if on_gpu else "float32",
                cpu_threads=torch.get_num_threads(),
                local_files_only=True,
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(f"recognizer {folder}: not readable by faster-whisper: {first_line(error)}") from None
        known = self._model.supported_languages
        if language not in known:
            raise ConfigError(f"recognizer {folder}: does not know the language {language!r}, only {', '.join(known)}")
        self._language = language
        self.name = (
            f"faster-whisper {version('faster-whisper')}, {folder.name} ({digest_of_files(folder.glob('*'))}),"
            f" beam {BEAM_SIZE}, language {language}"
        )

    def transcribe(self, audio: np.ndarray, sample_rate: int) -> str:
        """See :class:`~megatron_most.evaluation.recognizers.Recognizer`. Any length is heard, 30 s at a time."""
        audio = heard(audio, sample_rate, SAMPLE_RATE)
        # At temperature 0 alone: further ones sample, and the same audio would not give the same words.
        segments, _ = self._model.transcribe(
            audio, language=self._language, beam_size=BEAM_SIZE, temperature=0.0, condition_on_previous_text=False
        )
        return " ".join(segment.text.strip() for segment in segments).strip()
