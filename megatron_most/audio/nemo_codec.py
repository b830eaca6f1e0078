"""NeMo's ``AudioCodecModel`` as an :class:`~megatron_most.audio.codec.AudioCodec`.

Shape letters: T samples, C codebooks, F codec frames, b rows.

NeMo takes 8 s to import and is an optional dependency, so everything of it is imported inside functions. Its tokens are
``[b, C, F]``, our codes ``[F, C]``; they are turned around here and nowhere else.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from torch.nn.utils import parametrize

from megatron_most.audio.codec import AudioCodec, codec_file, file_fingerprint
from megatron_most.audio.io import resample
from megatron_most.audio.nemo_archive import BoundedBuilding, read_archive
from megatron_most.errors import ConfigError, DataError, first_line
from megatron_most.extras import require
from megatron_most.vocab import check_codes

_MOST_FRAMES_NEEDED = 32
"""Every codec is expected to encode this many frames, and a layer that looks ahead to change the last of them."""

_GPU_BATCH_SECONDS = 120.0
"""Audio of a batch on a GPU. On a CPU one file keeps a core busy, and batches were measured to gain nothing."""

_GPU_ROWS_OF_EQUAL_LENGTH = 8
"""Rows where a batch cannot be padded: few waveforms have the same number of frames."""


def load_codec(name_or_path: str | Path) -> AudioCodec:
    """Load a NeMo codec for the CPU, in float32: a ``.nemo`` file, or the name of a pretrained model (downloaded).

    Raises:
        ConfigError: NeMo is not installed, or there is neither a file nor a pretrained model of that name.
        DataError: the file is no intact NeMo codec.
    """
    file = codec_file(name_or_path)
    archive = read_archive(file) if file else None
    with quiet_nemo():
        model_class = _import_nemo()
        path = file or _download(model_class, str(name_or_path))
        config, weights = archive or read_archive(path)
        try:
            with BoundedBuilding(weights):
                model = model_class(cfg=OmegaConf.create(config))
            model.load_state_dict({name: tensor for name, tensor in weights.items() if _codes(name)})
        except Exception as error:  # NeMo raises whatever its configuration happens to trip over
            raise DataError(f"codec {path}: NeMo cannot build it: {first_line(error)}") from error
        _check_weights(model, weights, path)
        _fold_weight_norm(model)
    name = file.stem if file else str(name_or_path)
    return NemoCodec(model.float().eval(), name=name, fingerprint=file_fingerprint(path))


class NemoCodec:
    """See :class:`~megatron_most.audio.codec.AudioCodec`.

    Sums round in an order that depends on a batch's shape, and a code flips where rounding crosses the border between
    two. So a waveform is always encoded in a batch of the one shape that its length has, filled up with silence: its
    codes are a function of its samples alone.
    """

    def __init__(self, model, *, name: str, fingerprint: str) -> None:
        self.name = name
        self.fingerprint = fingerprint
        self.num_codebooks = int(model.num_codebooks)
        self.codebook_size = int(model.codebook_size)
        self.sample_rate = int(model.sample_rate)
        self.samples_per_frame = int(model.samples_per_frame)
        self._model = model
        self._device = torch.device("cpu")
        self._batch_seconds: float | None = None

    @property
    def frame_rate(self) -> float:
        return self.sample_rate / self.samples_per_frame

    def to(self, device: str) -> None:
        self._device = torch.device(device)
        self._model.to(self._device)
        self._batch_seconds = None if self._device.type == "cpu" else _GPU_BATCH_SECONDS
        if self._device.type == "cuda":
            # TF32 keeps 10 bits of a product; autotuning may choose another algorithm in another process.
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
            torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True

    def encode(self, waveform: np.ndarray) -> np.ndarray:
        return self.encode_batch([waveform])[0]

    def batch_shape(self, num_samples: int) -> tuple[int, int]:
        frames = max(1, math.ceil(num_samples / self.samples_per_frame))
        if self._batch_seconds is None:
            return 1, frames * self.samples_per_frame
        if not self._is_causal:
            return _GPU_ROWS_OF_EQUAL_LENGTH, frames * self.samples_per_frame
        step = 1 << max(0, frames.bit_length() - 4)  # eight lengths an octave: 6 % of padding on average
        samples = -(-frames // step) * step * self.samples_per_frame
        return max(1, int(self._batch_seconds * self.sample_rate) // samples), samples

    @torch.inference_mode()
    def encode_batch(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        for waveform in waveforms:
            if waveform.ndim != 1 or not waveform.size:
                raise DataError(f"codec {self.name}: a waveform needs shape [samples], not {list(waveform.shape)}")
            if self.batch_shape(waveform.size)[1] < self.min_samples:
                raise DataError(f"codec {self.name}: needs {self.min_samples} samples or more, not {waveform.size}")
        shapes = {self.batch_shape(waveform.size) for waveform in waveforms}
        assert len(shapes) == 1 and len(waveforms) <= next(iter(shapes))[0], f"{len(waveforms)} waveforms of {shapes}"
        rows, samples = shapes.pop()
        audio = np.zeros((rows, samples), dtype=np.float32)
        for row, waveform in zip(audio, waveforms, strict=False):
            row[: waveform.size] = waveform
        tokens, num_frames = self._model.encode(
            audio=torch.from_numpy(audio).to(self._device),
            audio_len=torch.full((rows,), samples, device=self._device),
        )
        expected = samples // self.samples_per_frame
        if int(num_frames[0]) != expected:
            raise DataError(
                f"codec {self.name}: gave {int(num_frames[0])} frames for {samples} samples, {expected} are expected"
                f" at {self.samples_per_frame} samples a frame"
            )
        tokens = tokens.cpu().numpy().astype(np.int64).swapaxes(1, 2)
        encoded = []
        for codes, waveform in zip(tokens, waveforms, strict=False):
            codes = np.ascontiguousarray(codes[: math.ceil(waveform.size / self.samples_per_frame)])
            self._check_range(codes)
            encoded.append(codes)
        return encoded

    @functools.cached_property
    def min_samples(self) -> int:
        """Convolutions that pad by reflection fail on fewer frames than they reflect; tried out as well."""
        for frames in range(1, _MOST_FRAMES_NEEDED):
            samples = frames * self.samples_per_frame
            with contextlib.suppress(RuntimeError):
                self._encode_audio(torch.zeros(1, samples))
                return samples
        raise DataError(f"codec {self.name}: cannot encode {_MOST_FRAMES_NEEDED} frames of silence")

    @functools.cached_property
    def _is_causal(self) -> bool:
        """Whether what stands after a waveform leaves its frames as they are; only then may a batch be padded.

        Tried out, not read off the configuration: any layer of any codec may look ahead.
        """
        samples = _MOST_FRAMES_NEEDED * self.samples_per_frame
        sound = torch.from_numpy(np.random.default_rng(0).uniform(-0.5, 0.5, (1, samples))).float()
        alone = self._encode_audio(sound)
        longer = self._encode_audio(torch.nn.functional.pad(sound, (0, samples)))
        return torch.allclose(longer[..., : alone.shape[-1]], alone, rtol=1e-3, atol=1e-3 * float(alone.abs().max()))

    @torch.inference_mode()
    def _encode_audio(self, audio: torch.Tensor) -> torch.Tensor:
        """What the encoder makes of audio ``[1, T]``, before it is rounded to codes: ``[1, features, F]``."""
        num_samples = torch.tensor([audio.shape[1]], device=self._device)
        return self._model.encode_audio(audio=audio.to(self._device), audio_len=num_samples)[0]

    @torch.inference_mode()
    def decode(self, codes: np.ndarray) -> np.ndarray:
        num_given = min(codes.shape[-1], self.num_codebooks)
        check_codes(codes, num_given, self.codebook_size, f"codec {self.name}")
        num_frames = len(codes)
        if num_frames == 0:
            return np.zeros(0, dtype=np.float32)
        tokens = torch.from_numpy(np.ascontiguousarray(codes.T, dtype=np.int64))[None].to(self._device)
        lengths = torch.tensor([num_frames], device=self._device)
        if num_given < self.num_codebooks:
            audio = self._decode_first(tokens, lengths)
        else:
            audio, _ = self._model.decode(tokens=tokens, tokens_len=lengths)
        waveform = audio[0].float().cpu().numpy()
        if not np.isfinite(waveform).all():
            raise DataError(f"codec {self.name}: gave samples that are not finite numbers for {num_frames} frames")
        rate = int(self._model.output_sample_rate)
        if rate != self.sample_rate:  # some codecs raise the rate while decoding
            waveform = resample(waveform, rate, self.sample_rate)
        expected = num_frames * self.samples_per_frame
        if len(waveform) < expected:
            raise DataError(
                f"codec {self.name}: gave {len(waveform)} samples for {num_frames} frames, {expected} are expected"
            )
        # Codecs on mel frames return one frame more than they were given.
        return np.ascontiguousarray(waveform[:expected], dtype=np.float32)

    def _decode_first(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Sound of the first codebooks alone, ``tokens [1, n, F]``.

        A residual quantizer adds codebooks up, so the others add nothing. Grouped scalar quantizers give each codebook
        channels of its own, and zero is the middle of what a channel can be.
        """
        quantizer = type(self._model.vector_quantizer).__name__
        if quantizer not in ("ResidualVectorQuantizer", "GroupFiniteScalarQuantizer"):
            raise DataError(f"codec {self.name}: a {quantizer} cannot decode {tokens.shape[1]} of its codebooks alone")
        latent = self._model.dequantize(tokens=tokens, tokens_len=lengths)
        whole = tokens.new_zeros(1, self.num_codebooks, 1)
        num_channels = self._model.dequantize(tokens=whole, tokens_len=torch.ones_like(lengths)).shape[1]
        latent = torch.nn.functional.pad(latent, (0, 0, 0, num_channels - latent.shape[1]))
        audio, _ = self._model.decode_audio(inputs=latent, input_len=lengths)
        return audio

    def _check_range(self, codes: np.ndarray) -> None:
        """NeMo itself turns codes that are too large into some other sound without a word."""
        check_codes(codes, self.num_codebooks, self.codebook_size, f"codec {self.name}")


def _import_nemo():
    require("nemo")
    try:
        from nemo.collections.tts.models import AudioCodecModel
    except ImportError as error:
        raise ConfigError(f"NeMo is installed and cannot be imported: {first_line(error)}") from None
    return AudioCodecModel


def _download(model_class, name: str) -> Path:
    try:
        return Path(model_class.from_pretrained(name, return_model_file=True))
    except Exception as error:  # network, hub and name errors have no common base class
        raise ConfigError(
            f"codec {name}: neither a .nemo file nor a pretrained model within reach: {first_line(error)}"
        ) from error


@contextlib.contextmanager
def quiet_nemo() -> Iterator[None]:
    """NeMo and what it imports warn at length about parts that are not used here."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _codes(name: str) -> bool:
    """Whether a weight encodes or decodes; losses, which a file also has, are built otherwise here and never used."""
    return name.removeprefix("semantic_codec.").startswith(("audio_encoder.", "audio_decoder.", "vector_quantizer."))


def _check_weights(model, stored: dict[str, torch.Tensor], path: Path) -> None:
    """NeMo's codec loads its state dict without insisting on every key; what is missing would stay random."""
    missing = [name for name in model.state_dict() if _codes(name) and name not in stored]
    if missing:
        raise DataError(f"codec {path}: the weights lack {missing[0]} and {len(missing) - 1} other tensors")
    for name, tensor in model.state_dict().items():  # a NaN would give codes of no sound
        if _codes(name) and torch.isnan(tensor).any():
            raise DataError(f"codec {path}: the weights {name} hold NaN")


def _fold_weight_norm(model) -> None:
    """Normalized weights are computed once here, to the same bits, and not in every call: 6 ms of a short file's 20."""
    for module in model.modules():
        if parametrize.is_parametrized(module):
            for parameter in list(module.parametrizations):
                parametrize.remove_parametrizations(module, parameter)
