"""How similar two voices are: the cosine of the embeddings that a model of speakers makes of them.

Values of different models do not compare: each has its own scale, and its own idea of what tells speakers apart.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_most import platform
from megatron_most.errors import ConfigError, DataError, first_line
from megatron_most.evaluation.recognizers import digest_of_files, heard
from megatron_most.evaluation.scorers import Reference, Sound, require_installed
from megatron_most.extras import require

SAMPLE_RATE = 16000


class SpeakerSimilarity(ABC):
    """See :class:`~megatron_most.evaluation.scorers.Scorer`. Voices that have nothing in common are 0."""

    name: str
    compared_with: Reference = "voice"
    values = {"speaker_similarity": 0.0}

    @abstractmethod
    def embedding(self, audio: np.ndarray) -> np.ndarray:
        """``audio [num_samples]`` at :data:`SAMPLE_RATE`, not empty, -> a vector."""

    def score(self, spoken: Sound, reference: Sound | None) -> dict[str, float]:
        assert reference is not None, "it asked for one"
        one, other = (self._unit(sound) for sound in (spoken, reference))
        return {"speaker_similarity": float(one @ other)}

    def _unit(self, sound: Sound) -> np.ndarray:
        audio = heard(sound.audio, sound.sample_rate, SAMPLE_RATE)
        if not np.any(audio):
            raise DataError("silence has no voice to compare")
        vector = np.asarray(self.embedding(audio), dtype=np.float64)
        length = np.linalg.norm(vector)
        if not np.isfinite(length) or length == 0:
            raise DataError("no voice was found to compare")
        return vector / length


class ResemblyzerSimilarity(SpeakerSimilarity):
    """By resemblyzer's speaker encoder (generalized end-to-end loss: Wan et al. 2018, arXiv 1710.10467).

    Raises:
        ConfigError: the package is not installed.
    """

    def __init__(self) -> None:
        # Its own dependencies would bring an outdated backport of typing and compile webrtcvad.
        command = "pip install --no-deps resemblyzer webrtcvad-wheels"
        require_installed("resemblyzer", command, "resemblyzer", "webrtcvad", "librosa")
        import resemblyzer

        self._package: Any = resemblyzer
        self._encoder: Any = resemblyzer.VoiceEncoder(platform.device(), verbose=False)
        self.name = f"resemblyzer {version('resemblyzer')}"

    def embedding(self, audio: np.ndarray) -> np.ndarray:
        voiced = self._package.preprocess_wav(np.clip(audio, -1, 1))
        if not len(voiced):
            raise DataError("no voice was found to compare")
        return self._encoder.embed_utterance(voiced)


class XVectorSimilarity(SpeakerSimilarity):
    """By an x-vector model of ``transformers`` in a folder: WavLM, UniSpeech-SAT, wav2vec 2.0.

    Raises:
        ConfigError: there is no such model.
    """

    def __init__(self, folder: Path) -> None:
        require("transformers")
        import transformers

        try:
            extractor = transformers.AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)  # nosec B615
            model = transformers.AutoModelForAudioXVector.from_pretrained(folder, local_files_only=True)  # nosec B615
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"--scorer xvector={folder}: not readable as an x-vector model: {first_line(error)}"
            ) from None
        if extractor.sampling_rate != SAMPLE_RATE:
            raise ConfigError(f"--scorer xvector={folder}: hears {extractor.sampling_rate} Hz, not {SAMPLE_RATE}")
        self._extractor, self._model = extractor, model.eval().to(platform.device())
        digest = digest_of_files(folder.glob("*"))
        self.name = f"{type(model).__name__} in {folder.name} ({digest}), transformers {version('transformers')}"

    @torch.inference_mode()
    def embedding(self, audio: np.ndarray) -> np.ndarray:
        inputs = self._extractor(audio, sampling_rate=SAMPLE_RATE, return_tensors="pt").to(self._model.device)
        try:
            found = self._model(**inputs).embeddings[0]
        except (RuntimeError, ValueError) as error:  # its convolutions need some tenths of a second
            raise DataError(f"{len(audio) / SAMPLE_RATE:.2f} s cannot be scored: {first_line(error)}") from None
        return found.float().cpu().numpy()
