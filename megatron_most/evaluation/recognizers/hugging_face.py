"""A recognizer of any vocabulary: a Whisper or CTC model (HuBERT, wav2vec 2.0) in a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_most import platform
from megatron_most.errors import ConfigError, first_line
from megatron_most.evaluation.recognizers import digest_of_files, heard
from megatron_most.extras import require
from megatron_most.files import read_json


class TransformersRecognizer:
    """Greedy transcripts by a speech recognition model of ``transformers``, on this process's device.

    Args:
        folder: the model with its processor. Nothing is downloaded, and code in the folder is not run.
        language: code of the language that a multilingual Whisper model hears; other models ignore it.

    Raises:
        ConfigError: there is no such model, or it is neither a CTC nor a sequence-to-sequence model.
    """

    def __init__(self, folder: str | Path, language: str = "en") -> None:
        require("transformers")
        import transformers

        folder = Path(folder)
        config = read_json(folder / "config.json")
        names = config.get("architectures") or [""]
        self._is_ctc = str(names[0]).endswith("ForCTC")
        kind = "AutoModelForCTC" if self._is_ctc else "AutoModelForSpeechSeq2Seq"
        try:
            self._processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)  # nosec B615
            model = getattr(transformers, kind).from_pretrained(folder, local_files_only=True)  # nosec B615
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"recognizer {folder}: not readable as a speech recognizer: {first_line(error)}"
            ) from None
        self._model: Any = model.eval().to(platform.device())
        self._sample_rate: int = self._processor.feature_extractor.sampling_rate
        self._most_samples: int | None = getattr(self._processor.feature_extractor, "n_samples", None)
        is_multilingual = not self._is_ctc and getattr(self._model.generation_config, "is_multilingual", False)
        self._language = {"language": language, "task": "transcribe"} if is_multilingual else {}
        spoken = f", language {language}" if is_multilingual else ""
        self.name = f"{names[0]} in {folder.name} ({digest_of_files(folder.glob('*'))}){spoken}"

    @torch.inference_mode()
    def transcribe(self, audio: np.ndarray, sample_rate: int) -> str:
        """See :class:`~megatron_most.evaluation.recognizers.Recognizer`. Whisper hears 30 s, a CTC model any length."""
        audio = heard(audio, sample_rate, self._sample_rate, self._most_samples)
        if not len(audio):
            return ""
        inputs = self._processor(audio, sampling_rate=self._sample_rate, return_tensors="pt").to(self._model.device)
        if self._is_ctc:
            ids = self._model(**inputs).logits.argmax(dim=-1)
            return self._processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
        ids = self._model.generate(**inputs, do_sample=False, num_beams=1, **self._language)
        return self._processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
