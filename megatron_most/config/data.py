"""Datasets, their shares of the blend, and rows."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_most.config.rules import require, require_positive
from megatron_most.keys import REQUIRED, key


@dataclass
class DatasetConfig:
    """A dataset that `most prepare build` made, and its share of the blend."""

    path: str = key(REQUIRED, "path prefix of the dataset, without `.json`", "--data-path")
    weight: float = key(1.0, "share of the tokens, relative to the weights of the other datasets")

    def __post_init__(self) -> None:
        require(self.weight > 0, f"data: weight of {self.path}", self.weight, "must be greater than 0")


@dataclass
class DataConfig:
    """Training and validation data."""

    train: list[DatasetConfig] = key(list, "training datasets and their weights", "--train-data-path")
    validation: list[DatasetConfig] = key(
        list, "validation datasets, measured one by one; their weights are ignored", "--valid-data-path"
    )
    seq_length: int = key(4096, "positions in a row", "--seq-length")
    packing: bool = key(True, "pack several documents into a row; otherwise, a row holds one")
    audio_frame_dropout: float = key(
        0.0,
        "fraction of the codec frames of speech targets that is hidden from the input, so that the model has to read"
        " the text",
    )
    audio_share: float | None = key(
        None, "change the weights of `train`, as little as possible, so that this fraction of the tokens is audio"
    )
    document_multiple: int = key(
        1, "pad each packed document to a multiple of this; context parallelism needs a multiple of twice its size"
    )

    def __post_init__(self) -> None:
        require_positive("data", self, ("seq_length", "document_multiple"))
        require(
            self.seq_length % self.document_multiple == 0,
            "data.document_multiple",
            self.document_multiple,
            f"must divide data.seq_length, {self.seq_length}",
        )
        require(
            self.audio_share is None or 0 < self.audio_share < 1,
            "data.audio_share",
            self.audio_share,
            "must be between 0 and 1, or null",
        )
        require(
            0 <= self.audio_frame_dropout < 1, "data.audio_frame_dropout", self.audio_frame_dropout, "must be in [0, 1)"
        )
