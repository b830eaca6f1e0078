"""Opens ``.nemo`` files from strangers: a tar with the YAML that names a model's classes, and a pickle of its weights.

Of a codec nothing is extracted to disk. Of its configuration, only what encodes and decodes is kept, and every class in
it must be one of those that NeMo's codecs are made of: what else a file asks for is never built.

Speech recognizers have too many classes to name. Theirs must be NeMo's own. NeMo restores them, and reads their weights
as weights only.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, cast

import torch
from omegaconf import OmegaConf

from megatron_most.errors import DataError, first_line, shown
from megatron_most.yaml_text import MAX_BYTES, check_expansion, load_yaml

CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"
TARGET = "nemo.collections.tts.models.audio_codec.AudioCodecModel"

_MODULES = "nemo.collections.tts.modules"
CLASSES = frozenset(
    (
        *(
            f"{_MODULES}.audio_codec_modules.{name}"
            for name in (
                "CausalHiFiGANDecoder",
                "CausalHiFiGANEncoder",
                "FiniteScalarQuantizer",
                "FullBandMelEncoder",
                "GroupFiniteScalarQuantizer",
                "HiFiGANDecoder",
                "HiFiGANEncoder",
                "MelSpectrogramProcessor",
                "MultiBandMelEncoder",
                "MultiResolutionSTFTEncoder",
                "ResNetDecoder",
                "ResNetEncoder",
                "STFTProcessor",
            )
        ),
        *(
            f"{_MODULES}.encodec_modules.{name}"
            for name in ("GroupResidualVectorQuantizer", "ResidualVectorQuantizer", "SEANetDecoder", "SEANetEncoder")
        ),
    )
)
"""What an encoder, a decoder and a quantizer are made of. None of them opens a file or an address."""

_KEPT = ("sample_rate", "output_sample_rate", "samples_per_frame", "audio_encoder", "audio_decoder", "vector_quantizer")
_REQUIRED = ("sample_rate", "samples_per_frame", "audio_encoder", "audio_decoder", "vector_quantizer")
_LOSSES = "nemo.collections.tts.losses.audio_codec_loss"
_TRAINING = {
    # NeMo builds losses and needs a value for each; they are never computed here.
    "loss_resolutions": [[512, 128, 512]],
    "mel_loss_dims": [20],
    "commit_loss_scale": 0.0,
    "generator_loss": {"_target_": f"{_LOSSES}.GeneratorSquaredLoss"},
    "discriminator_loss": {"_target_": f"{_LOSSES}.DiscriminatorSquaredLoss"},
    "target": TARGET,
}

RECOGNIZERS = "a model of nemo.collections.asr"
_RECOGNIZER_MODELS = "nemo.collections.asr.models."
_RECOGNIZER_PARTS = ("nemo.collections.asr.", "nemo.collections.common.tokenizers.", "nemo.collections.common.parts.")
_TRAINS = frozenset(("train_ds", "validation_ds", "test_ds", "optim", "trainer", "exp_manager"))

_MAX_MEMBERS = 1000
_MAX_WEIGHTS = 4 << 30
_MOST_EXPANSION, _ALWAYS_ALLOWED = 20, 64 << 20
"""A compressed archive may become this many times as large, or this many bytes. Weights hardly shrink."""


def read_archive(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The configuration to build a codec from, and its weights.

    Raises:
        DataError: no intact archive of a codec, or one that asks for more than a codec needs.
    """
    contents = _read(path, "codec", (CONFIG, WEIGHTS))
    try:
        config = codec_config(contents[CONFIG])
    except ValueError as error:
        raise DataError(f"codec {path}: {CONFIG}: {error}") from None
    return config, _weights(contents[WEIGHTS], path)


def read_recognizer_config(path: Path) -> dict[str, Any]:
    """The configuration to restore a speech recognizer with, without what only trains.

    Raises:
        DataError: no intact archive of a recognizer, or one that asks for classes of others than NeMo.
    """
    content = _read(path, "recognizer", (CONFIG,))[CONFIG]
    try:
        config = {key: value for key, value in _resolved(content, RECOGNIZERS).items() if key not in _TRAINS}
        for key, named in _instructions(config):
            if key != "_target_" or not isinstance(named, str) or not named.startswith(_RECOGNIZER_PARTS):
                raise ValueError(f"{key}={shown(named, 100)}: is no class of a NeMo recognizer")
    except ValueError as error:
        raise DataError(f"recognizer {path}: {CONFIG}: {error}") from None
    return config


def _read(path: Path, what: str, wanted: tuple[str, ...]) -> dict[str, bytes]:
    """The files of an archive that are ``wanted``; :class:`DataError` for one that no tool of NeMo's writes."""
    try:
        with open(path, "rb") as file:
            is_compressed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            limit = max(_MOST_EXPANSION * path.stat().st_size, _ALWAYS_ALLOWED)
            stream = _Bounded(gzip.GzipFile(fileobj=file), limit) if is_compressed else file
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                contents = _contents(archive, wanted)
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{what} {path}: not readable as a .nemo archive: {first_line(error)}") from None
    for name in wanted:
        if name not in contents:
            raise DataError(f"{what} {path}: has no {name}, so it is no NeMo model")
    return contents


def _contents(archive: tarfile.TarFile, wanted: tuple[str, ...]) -> dict[str, bytes]:
    """The wanted files of a model. Raises :class:`ValueError` for an archive that no tool of NeMo's writes."""
    contents: dict[str, bytes] = {}
    for number, member in enumerate(archive, start=1):
        name = PurePosixPath(member.name)
        if number > _MAX_MEMBERS:
            raise ValueError(f"holds more than {_MAX_MEMBERS:,} files")
        if name.is_absolute() or ".." in name.parts or not (member.isreg() or member.isdir()) or member.issparse():
            raise ValueError(f"{shown(member.name)}: must be a file or folder inside the archive")
        if name.name not in wanted or not member.isreg():
            continue
        if name.name in contents:
            raise ValueError(f"{name.name} is in it twice")
        limit = MAX_BYTES if name.name == CONFIG else _MAX_WEIGHTS
        if member.size > limit:
            raise ValueError(f"{name.name}: larger than {limit >> 20} MiB")
        file = archive.extractfile(member)
        assert file is not None, "a regular file has content"
        contents[name.name] = file.read()
    return contents


class _Bounded(io.RawIOBase):
    """A decompressed stream that ends with an error where it becomes absurdly long."""

    def __init__(self, stream: gzip.GzipFile, limit: int) -> None:
        self._stream, self._limit = stream, limit

    def read(self, size: int = -1) -> bytes:
        room = self._limit - self._stream.tell() + 1
        content = self._stream.read(room if size < 0 else min(size, room))
        if len(content) == room:
            raise ValueError(f"decompresses to more than {self._limit >> 20} MiB")
        return content

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_SET and offset > self._limit:
            raise ValueError(f"decompresses to more than {self._limit >> 20} MiB")
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()


def codec_config(content: bytes) -> dict[str, Any]:
    """What of ``model_config.yaml`` a codec is built from; :class:`ValueError` in one line for anything else."""
    return _kept(_resolved(content, "an AudioCodecModel"))


def _resolved(content: bytes, wanted: str) -> dict[str, Any]:
    """``model_config.yaml`` without interpolations; :class:`ValueError` unless its model is what is ``wanted``."""
    config = load_yaml(content.decode("utf-8"))
    if not isinstance(config, dict):
        raise ValueError("must hold a mapping")
    target = config.get("target")
    is_wanted = isinstance(target, str) and (
        target.startswith(_RECOGNIZER_MODELS) if wanted == RECOGNIZERS else target.endswith(".AudioCodecModel")
    )
    if not is_wanted:
        raise ValueError(f"target={shown(target)}: must be {wanted}")
    check_expansion(config)
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(config), resolve=True)
    except Exception as error:  # a key that is no text, a name that is not there
        raise ValueError(first_line(error)) from None
    return cast(dict[str, Any], resolved)


def _kept(config: dict[str, Any]) -> dict[str, Any]:
    for name in _REQUIRED:
        if name not in config:
            raise ValueError(f"{name} is missing")
    kept = {name: config[name] for name in _KEPT if name in config}
    for name, value in kept.items():
        if name.startswith(("audio", "vector")):
            if not isinstance(value, dict) or "_target_" not in value:
                raise ValueError(f"{name}={shown(value, 60)}: must be a mapping with a _target_")
        elif type(value) is not int or not 0 < value < 1 << 20:
            raise ValueError(f"{name}={shown(value, 60)}: must be an integer above 0")
    for key, named in _instructions(kept):
        if key != "_target_" or not isinstance(named, str) or named not in CLASSES:
            raise ValueError(f"{key}={shown(named, 100)}: is no class of a codec")
    if config.get("semantic_codec"):  # another codec whose codes come first
        if not isinstance(config["semantic_codec"], dict):
            raise ValueError("semantic_codec: must be a mapping")
        kept["semantic_codec"] = _kept(config["semantic_codec"])
    return kept | _TRAINING


def _instructions(config: object) -> Iterator[tuple[str, Any]]:
    """Every key that Hydra, which builds the classes, takes for itself: ``_target_``, ``_args_``, ``_partial_`` ..."""
    if isinstance(config, dict):
        for key, value in config.items():
            if str(key).startswith("_"):
                yield str(key), value
            yield from _instructions(value)
    elif isinstance(config, list):
        for value in config:
            yield from _instructions(value)


def _weights(content: bytes, path: Path) -> dict[str, torch.Tensor]:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as entries:
            if sum(entry.file_size for entry in entries.infolist()) > len(content):
                raise ValueError("holds more than its size")
        weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # broken bytes can raise anything
        reason = first_line(error).partition(". ")[0]
        raise DataError(f"codec {path}: {WEIGHTS}: unreadable as weights only: {reason}") from None
    if not isinstance(weights, dict) or not all(
        isinstance(key, str) and torch.is_tensor(value) for key, value in weights.items()
    ):
        raise DataError(f"codec {path}: {WEIGHTS}: must hold a dictionary of tensors")
    return weights


class BoundedBuilding(torch.overrides.TorchFunctionMode):
    """While active, building modules ends with :class:`ValueError` when they get far larger than ``weights``."""

    _MAX_CALLS = 1_000_000

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        # Initialization goes over a tensor several times, and the filters of NeMo's losses come on top.
        stored = sum(tensor.untyped_storage().nbytes() for tensor in weights.values())
        self._values = 32 * stored + (1 << 26)
        self._calls = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self._calls += 1
        if torch.is_tensor(result):
            self._values -= result.numel()
        if self._values < 0 or self._calls > self._MAX_CALLS:
            raise ValueError("its modules are far larger than its weights")
        return result
