"""What the rows of a run hold: modalities, targets, and how far attention reaches.

FLOPs, memory and time depend on it. It is read from the training datasets where they exist, and assumed elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from megatron_most.config import RunConfig
from megatron_most.data.loading.blend import weights_for_audio_share
from megatron_most.data.storage.token_dataset import TokenDataset
from megatron_most.vocab import Modality

_SAMPLE = 512
"""Documents of a dataset whose targets are counted."""
_ASSUMED_DOCUMENT = 200
"""Positions of an utterance of LibriSpeech (12.3 s) with its text, in layout `frame` at 12.5 frames a second."""
_ASSUMED_TARGETS = 0.6
"""Share of targets in the paper's blend: ASR 0.4 with targets at 0.21 of its positions, TTS 0.4 at 0.79, text 0.2."""
_ASSUMED_FRAME_TARGETS = 0.5
"""Share of the frames that are targets: those of TTS, where ASR has as many that are not."""


@dataclass(frozen=True)
class RowContents:
    """Means over the positions of a row.

    Args:
        modalities: share of each modality; they add up to 1.
        targets: share of positions with a target. Heads and losses are computed for these alone.
        frame_targets: share of positions whose target is a frame with codes of its own, which take the codebook heads.
        attended: positions to which a position attends, itself included.
        source: where the numbers are from, for people.
    """

    modalities: dict[str, float]
    targets: float
    frame_targets: float
    attended: float
    source: str


def row_contents(config: RunConfig) -> RowContents:
    """What rows of ``config`` hold: read from its training datasets if all of them are built, or else assumed."""
    paths = [entry.path for entry in config.data.train]
    if not paths or not all(Path(f"{path}.json").is_file() for path in paths):
        return assumed_contents(config)
    datasets = [TokenDataset(path) for path in paths]
    weights = [entry.weight for entry in config.data.train]
    shares = np.array(weights) / sum(weights)
    if config.data.audio_share is not None:
        audio_shares = [dataset.audio_share for dataset in datasets]
        shares = weights_for_audio_share(weights, audio_shares, config.data.audio_share)
    return _mean([_contents_of(config, dataset) for dataset in datasets], shares)


def assumed_contents(config: RunConfig) -> RowContents:
    """Without datasets: the paper's blend of short utterances, and modalities by :func:`modality_shares`."""
    modalities = modality_shares(config)
    audio = modalities[config.vocab.modality_names[Modality.AUDIO]]
    has_codes = config.vocab.codec_layout.uses_side_codes
    length = min(_ASSUMED_DOCUMENT, config.data.seq_length) if config.data.packing else config.data.seq_length
    return RowContents(
        modalities,
        targets=_ASSUMED_TARGETS,
        frame_targets=min(_ASSUMED_TARGETS, _ASSUMED_FRAME_TARGETS * audio) if has_codes else 0.0,
        attended=(length + 1) / 2,
        source="assumed",
    )


def modality_shares(config: RunConfig) -> dict[str, float]:
    """Assumed share of each modality: ``data.audio_share`` where it is set, the others equal; else all equal."""
    names = config.vocab.modality_names
    audio = config.data.audio_share
    if audio is None:
        return dict.fromkeys(names, 1 / len(names))
    rest = (1 - audio) / (len(names) - 1)
    return {name: audio if index == Modality.AUDIO else rest for index, name in enumerate(names)}


def _contents_of(config: RunConfig, dataset: TokenDataset) -> RowContents:
    lengths = dataset.lengths.astype(np.float64) - 1  # the last id of a document is only a label
    sample = np.unique(np.linspace(0, len(dataset) - 1, _SAMPLE).astype(np.int64))
    document = dataset.read(sample)
    positions, is_frame = len(document) - len(sample), dataset.vocab.codec_layout.holds_side_codes(document.ids)
    attended = (lengths * (lengths + 1)).sum() / 2 / lengths.sum()
    total = sum(dataset.input_positions.values())
    return RowContents(
        {name: count / total for name, count in dataset.input_positions.items()},
        targets=np.count_nonzero(document.loss_mask) / positions,
        frame_targets=np.count_nonzero(document.loss_mask & is_frame) / positions,
        # A row without packing is one document and padding, to which its kernel attends as well.
        attended=float(attended) if config.data.packing else (config.data.seq_length + 1) / 2,
        source="from the datasets",
    )


def _mean(contents: Sequence[RowContents], shares: np.ndarray) -> RowContents:
    """Means by the datasets' shares of the positions."""
    numbers = {
        field.name: float(sum(share * getattr(one, field.name) for one, share in zip(contents, shares, strict=True)))
        for field in fields(RowContents)
        if field.name not in ("modalities", "source")
    }
    modalities = {
        name: float(sum(share * one.modalities[name] for one, share in zip(contents, shares, strict=True)))
        for name in contents[0].modalities
    }
    return RowContents(modalities, source=contents[0].source, **numbers)
