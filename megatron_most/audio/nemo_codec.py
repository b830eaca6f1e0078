"""NeMo's ``AudioCodecModel`` as an :class:`~megatron_most.audio.codec.AudioCodec`.

NeMo takes 8 s to import and is an optional dependency, so everything of it is imported inside functions.
"""

from __future__ import annotations

import contextlib
import logging
import math
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soxr
import torch
import yaml

from megatron_most.audio.codec import AudioCodec, codec_file, file_fingerprint
from megatron_most.errors import ConfigError, DataError
from megatron_most.vocab import check_codes

_TRUSTED_PACKAGES = ("nemo.", "torch.")


def load_codec(name_or_path: str | Path) -> AudioCodec:
    """Load a NeMo codec for the CPU, in float32: a ``.nemo`` file, or the name of a pretrained model (downloaded).

    Raises:
        ConfigError: NeMo is not installed, or there is neither a file nor a pretrained model of that name.
        DataError: the file is no intact NeMo codec.
    """
    file = codec_file(name_or_path)
    if file:
        _check_archive(file)
    with _quiet_nemo():
        model_class = _import_nemo()
        path = file or _download(model_class, str(name_or_path))
        if not file:
            _check_archive(path)
        try:
            model = model_class.restore_from(str(path), map_location="cpu")
        except Exception as error:  # NeMo raises whatever its configuration and unpickling happen to trip over
            raise DataError(f"codec {path}: NeMo cannot restore it: {_one_line(error)}") from error
        _check_weights(model, path)
    name = file.stem if file else str(name_or_path)
    return NemoCodec(model.float().eval(), name=name, fingerprint=file_fingerprint(path))


class NemoCodec:
    """See :class:`~megatron_most.audio.codec.AudioCodec`. One waveform at a time: with several in a batch, codecs that
    look ahead change the last frames of the shorter ones."""

    def __init__(self, model, *, name: str, fingerprint: str) -> None:
        self.name = name
        self.fingerprint = fingerprint
        self.num_codebooks = int(model.num_codebooks)
        self.codebook_size = int(model.codebook_size)
        self.sample_rate = int(model.sample_rate)
        self.samples_per_frame = int(model.samples_per_frame)
        self._model = model

    @property
    def frame_rate(self) -> float:
        return self.sample_rate / self.samples_per_frame

    @torch.inference_mode()
    def encode(self, waveform: np.ndarray) -> np.ndarray:
        if waveform.ndim != 1 or not waveform.size:
            raise DataError(f"codec {self.name}: a waveform needs shape [samples], not {list(waveform.shape)}")
        audio = torch.from_numpy(np.ascontiguousarray(waveform, dtype=np.float32))[None]
        tokens, num_frames = self._model.encode(audio=audio, audio_len=torch.tensor([audio.shape[1]]))
        codes = tokens[0, :, : int(num_frames[0])].numpy().astype(np.int64)
        self._check_range(codes)
        expected = math.ceil(waveform.size / self.samples_per_frame)  # NeMo pads every codec's input to whole frames
        if codes.shape[1] != expected:
            raise DataError(
                f"codec {self.name}: gave {codes.shape[1]} frames for {waveform.size} samples, {expected} are expected"
                f" at {self.samples_per_frame} samples a frame"
            )
        return codes

    @torch.inference_mode()
    def decode(self, codes: np.ndarray) -> np.ndarray:
        self._check_range(codes)
        num_frames = codes.shape[1]
        if num_frames == 0:
            return np.zeros(0, dtype=np.float32)
        tokens = torch.from_numpy(np.ascontiguousarray(codes, dtype=np.int64))[None]
        audio, _ = self._model.decode(tokens=tokens, tokens_len=torch.tensor([num_frames]))
        waveform = audio[0].float().numpy()
        rate = int(self._model.output_sample_rate)
        if rate != self.sample_rate:  # some codecs raise the rate while decoding
            waveform = soxr.resample(waveform, rate, self.sample_rate)
        expected = num_frames * self.samples_per_frame
        if len(waveform) < expected:
            raise DataError(
                f"codec {self.name}: gave {len(waveform)} samples for {num_frames} frames, {expected} are expected"
            )
        # Codecs on mel frames return one frame more than they were given.
        return np.ascontiguousarray(waveform[:expected], dtype=np.float32)

    def _check_range(self, codes: np.ndarray) -> None:
        """NeMo itself turns codes that are too large into some other sound without a word."""
        check_codes(codes, self.num_codebooks, self.codebook_size, f"codec {self.name}")


def _import_nemo():
    try:
        from nemo.collections.tts.models import AudioCodecModel
    except ImportError as error:
        raise ConfigError(
            f"NeMo is needed for audio codecs and cannot be imported ({_one_line(error)}):"
            " pip install megatron-most[audio]"
        ) from None
    return AudioCodecModel


def _download(model_class, name: str) -> Path:
    try:
        return Path(model_class.from_pretrained(name, return_model_file=True))
    except Exception as error:  # network, hub and name errors have no common base class
        raise ConfigError(
            f"codec {name}: neither a .nemo file nor a pretrained model within reach: {_one_line(error)}"
        ) from error


@contextlib.contextmanager
def _quiet_nemo() -> Iterator[None]:
    """NeMo and what it imports warn at length about parts a codec does not use."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _check_archive(path: Path) -> None:
    """A ``.nemo`` file is a tar whose YAML names the classes to build: only NeMo's and torch's are let through."""
    try:
        with tarfile.open(path) as archive:
            members = {Path(member.name).name: member for member in archive.getmembers()}
            file = archive.extractfile(members["model_config.yaml"])
            config = yaml.safe_load(file) if file else None
    except KeyError:
        raise DataError(f"codec {path}: has no model_config.yaml, so it is no NeMo model") from None
    except (tarfile.TarError, EOFError, OSError, yaml.YAMLError) as error:
        raise DataError(f"codec {path}: not readable as a .nemo archive: {_one_line(error)}") from None
    target = config.get("target", "") if isinstance(config, dict) else ""
    if not target.endswith(".AudioCodecModel"):
        raise DataError(f"codec {path}: holds {target or 'an unknown model'}, not an AudioCodecModel")
    for named in _targets(config):
        if not named.startswith(_TRUSTED_PACKAGES):
            raise DataError(f"codec {path}: asks for the class {named}, which is neither NeMo's nor torch's")


def _targets(config: object) -> Iterator[str]:
    if isinstance(config, dict):
        for key, value in config.items():
            if key in ("_target_", "target") and isinstance(value, str):
                yield value
            else:
                yield from _targets(value)
    elif isinstance(config, list):
        for value in config:
            yield from _targets(value)


def _check_weights(model, path: Path) -> None:
    """NeMo's codec loads its state dict without insisting on every key; what is missing would stay random."""
    with tarfile.open(path) as archive:
        member = next(member for member in archive.getmembers() if member.name.endswith("model_weights.ckpt"))
        stored = torch.load(archive.extractfile(member), map_location="cpu", weights_only=True)
    parts = ("audio_encoder.", "audio_decoder.", "vector_quantizer.")
    missing = [name for name in model.state_dict() if name.startswith(parts) and name not in stored]
    if missing:
        raise DataError(f"codec {path}: the weights lack {missing[0]} and {len(missing) - 1} other tensors")


def _one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
