"""A recognizer of any vocabulary: a NeMo ASR model (FastConformer, Parakeet, Canary) in a ``.nemo`` file."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from megatron_most import platform
from megatron_most.audio.nemo_archive import read_recognizer_config
from megatron_most.audio.nemo_codec import quiet_nemo
from megatron_most.errors import ConfigError, DataError, first_line
from megatron_most.evaluation.recognizers import digest_of_files, heard
from megatron_most.extras import require


class NemoRecognizer:
    """Transcripts by a NeMo model with its own decoding, on this process's device.

    Args:
        path: the ``.nemo`` file. Classes that are not NeMo's are refused before anything of it is built.

    Raises:
        ConfigError: NeMo is not installed, or the file is no intact ASR model.
    """

    def __init__(self, path: str | Path) -> None:
        require("nemo")
        path = Path(path)
        try:
            config = OmegaConf.create(read_recognizer_config(path))
        except DataError as error:
            raise ConfigError(str(error)) from None
        with quiet_nemo():
            from nemo.collections.asr.models import ASRModel

            try:
                model = ASRModel.restore_from(str(path), override_config_path=config, map_location=torch.device("cpu"))
            except Exception as error:  # NeMo raises whatever its configuration and weights happen to trip over
                raise ConfigError(f"recognizer {path}: NeMo cannot restore it: {first_line(error)}") from None
        self._model: Any = model.float().eval().to(platform.device())
        self._sample_rate = int(model.cfg.get("sample_rate") or model.preprocessor._sample_rate)
        digest = digest_of_files([path])
        self.name = f"{type(model).__name__} in {path.name} ({digest}), NeMo {version('nemo_toolkit')}"

    @torch.inference_mode()
    def transcribe(self, audio: np.ndarray, sample_rate: int) -> str:
        """See :class:`~megatron_most.evaluation.recognizers.Recognizer`. Any length is heard."""
        audio = heard(audio, sample_rate, self._sample_rate)
        if not len(audio):
            return ""
        with quiet_nemo():
            [found] = self._model.transcribe([audio], batch_size=1, verbose=False)
        return str(getattr(found, "text", found)).strip()
