"""A recognizer of any vocabulary: a Whisper or CTC model (HuBERT, wav2vec 2.0) in a Hugging Face folder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_most import platform
from megatron_most.audio.io import resample
from megatron_most.errors import ConfigError, DataError, first_line
from megatron_most.extras import require
from megatron_most.files import read_json


class TransformersRecognizer:
    """Greedy transcripts by a speech recognition model of ``transformers``, on this process's device.

    Args:
        folder: the model with its processor. Nothing is downloaded, and code in the folder is not run.

    Raises:
        ConfigError: there is no such model, or it is neither a CTC nor a sequence-to-sequence model.
    """

    def __init__(self, folder: str | Path) -> None:
        require("transformers")
        import transformers

        folder = Path(folder)
        config = read_json(folder / "config.json")
        names = config.get("architectures") or [""]
        self._is_ctc = str(names[0]).endswith("ForCTC")
        kind = "AutoModelForCTC" if self._is_ctc else "AutoModelForSpeechSeq2Seq"
        try:
            self._processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
            model = getattr(transformers, kind).from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"recognizer {folder}: not readable as a speech recognizer: {first_line(error)}"
            ) from None
        self._model: Any = model.eval().to(platform.device())
        self._sample_rate: int = self._processor.feature_extractor.sampling_rate
        self._most_samples: int | None = getattr(self._processor.feature_extractor, "n_samples", None)
        files = [(file.name, file.stat().st_size) for file in sorted(folder.glob("*")) if file.is_file()]
        self.name = f"{names[0]} in {folder.name} ({hashlib.sha256(repr(files).encode()).hexdigest()[:12]})"

    @torch.inference_mode()
    def transcribe(self, audio: np.ndarray, sample_rate: int) -> str:
        """See :class:`~megatron_most.evaluation.recognizer.Recognizer`.

        Raises:
            DataError: ``audio`` is empty, not finite, or longer than the model hears (30 s for Whisper).
        """
        audio = np.asarray(audio, dtype=np.float32)
        if audio.ndim != 1 or not len(audio) or not np.isfinite(audio).all():
            raise DataError("audio to recognize must be finite values of shape [num_samples]")
        if sample_rate != self._sample_rate:
            audio = resample(audio, sample_rate, self._sample_rate)
        if self._most_samples is not None and len(audio) > self._most_samples:
            seconds, most = len(audio) / self._sample_rate, self._most_samples / self._sample_rate
            raise DataError(f"audio to recognize has {seconds:.1f} s, the recognizer hears {most:.0f} s")
        inputs = self._processor(audio, sampling_rate=self._sample_rate, return_tensors="pt").to(self._model.device)
        if self._is_ctc:
            ids = self._model(**inputs).logits.argmax(dim=-1)
            return self._processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
        ids = self._model.generate(**inputs, do_sample=False, num_beams=1)
        return self._processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
