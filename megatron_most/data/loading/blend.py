"""An endless, random-access sequence of rows drawn from several datasets.

Row k depends only on the seed, the datasets, their weights, the ``data`` section and k. Any rank can compute any row,
and a resumed run needs only the number of rows consumed.

* A row holds documents of one dataset. Attention and loss stay inside each document, so mixing datasets in a row would
  gain nothing.
* Weights are shares of **tokens**: a dataset with more tokens per row gets fewer rows. The order of datasets repeats
  every ``BLOCK`` rows. Any run of consecutive rows, and so the rows that an expert-parallel group reads at the same
  time, has each dataset's share, and the share of audio, to within about two rows.
* Each document appears once per epoch of its dataset. Documents are packed once. Each epoch swaps documents that take
  equally many positions and shuffles the rows: neighbors change, but every epoch has the same number of rows, so row k
  can be computed without the rows before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_most.config import DataConfig
from megatron_most.data.loading.packing import pack, padded_length
from megatron_most.data.storage.documents import TASKS, Document
from megatron_most.data.storage.token_dataset import TokenDataset
from megatron_most.errors import ConfigError, DataError

BLOCK = 1 << 16

_GOLDEN_RATIO = (5**0.5 - 1) / 2

# Purposes of random streams.
_PACK, _EPOCH, _BLEND, _DROPOUT = range(1, 5)


@dataclass
class Row:
    """Documents of one task for one row of a batch; n positions in all.

    task: index into :data:`~megatron_most.data.storage.documents.TASKS`.
    document: the documents, concatenated; None for a row of padding.
    lengths: int64, positions of each document; they sum to n.
    hidden: ``[n]`` bool, positions of audio to hide from the input; None hides nothing.
    """

    task: int
    document: Document | None = None
    lengths: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    hidden: np.ndarray | None = None


@dataclass(frozen=True)
class RowSources:
    """Where the documents of a row come from.

    row: number of the row in the sequence.
    dataset: path prefix.
    documents, offsets, lengths: of each document, its index in the dataset, its first position in the row, and its
        number of positions; its last id is only a label.
    """

    row: int
    dataset: str
    task: str
    documents: list[int]
    offsets: list[int]
    lengths: list[int]


class Rows:
    """The sequence: ``rows[k]`` is a :class:`Row` of at most ``data.seq_length`` input positions, for any k >= 0.

    Threads may share it.

    Args:
        weights: the share of tokens of each dataset, up to a common factor.
        data: length and packing of rows and the share of frames to hide; its datasets and weights are not used.

    Raises:
        DataError: a dataset is empty or has documents longer than a row.
    """

    def __init__(
        self,
        datasets: Sequence[TokenDataset],
        weights: npt.ArrayLike,
        data: DataConfig,
        seed: int,
    ) -> None:
        self._seed = seed
        self._dropout = data.audio_frame_dropout
        self._document_multiple = data.document_multiple
        self._streams = [_DatasetRows(dataset, index, data, seed) for index, dataset in enumerate(datasets)]
        tokens_per_row = np.array([stream.tokens_per_row for stream in self._streams])
        audio_shares = np.array([dataset.audio_share for dataset in datasets])
        row_shares = np.asarray(weights) / tokens_per_row
        self._block, self._rank_in_block, self._per_block = _blend(row_shares, audio_shares, seed)

    @property
    def rows_per_epoch(self) -> list[int]:
        """The number of rows in an epoch of each dataset."""
        return [stream.num_rows for stream in self._streams]

    def __getitem__(self, k: int) -> Row:
        dataset, indices = self._find(k)
        document = dataset.read(indices)
        hidden = self._hide_frames(document, dataset, k) if self._dropout else None
        return Row(TASKS.index(dataset.task), document, dataset.lengths[indices].astype(np.int64), hidden)

    def sources(self, k: int) -> RowSources:
        """Which documents ``rows[k]`` holds. Does not read them."""
        dataset, indices = self._find(k)
        lengths = dataset.lengths[indices].astype(np.int64)
        ends = padded_length(lengths - 1, self._document_multiple).cumsum()
        offsets = [0, *ends[:-1].tolist()]
        return RowSources(k, dataset.prefix, dataset.task, indices.tolist(), offsets, lengths.tolist())

    def _find(self, k: int) -> tuple[TokenDataset, np.ndarray]:
        """The dataset of row k, and the indices of the row's documents."""
        block, place = divmod(k, BLOCK)
        index = int(self._block[place])
        stream = self._streams[index]
        return stream.dataset, stream.row(block * int(self._per_block[index]) + int(self._rank_in_block[place]))

    def _hide_frames(self, document: Document, dataset: TokenDataset, k: int) -> np.ndarray:
        """Hide whole steps of the audio that carries loss, drawn from the seed and k alone."""
        generator = _stream(self._seed, _DROPOUT, k)
        vocab = dataset.vocab
        hidden = np.zeros(len(document), dtype=bool)
        for start, end in vocab.audio_segments(document.ids):
            if document.loss_mask[start]:
                steps = vocab.codec_layout.steps(end - start)
                hidden[start:end] = (generator.random(steps[-1] + 1) < self._dropout)[steps]
        return hidden


class _Shuffled(NamedTuple):
    """An epoch of a dataset: its rows in order, and the document in each place of the packed rows."""

    epoch: int
    row_order: np.ndarray
    document_in_slot: np.ndarray


class _DatasetRows:
    """The rows of one dataset, epoch after epoch."""

    def __init__(self, dataset: TokenDataset, index: int, data: DataConfig, seed: int) -> None:
        self.dataset = dataset
        self._seed, self._index = seed, index
        lengths = dataset.lengths.astype(np.int64) - 1  # input positions: the last id is only a label
        if not len(lengths):
            raise DataError(f"dataset {dataset.prefix}: holds no documents")
        too_long = int((lengths > data.seq_length).sum())
        if too_long:
            raise DataError(
                f"dataset {dataset.prefix}: {too_long} of {len(lengths)} documents do not fit"
                f" data.seq_length={data.seq_length} (the longest needs {lengths.max()})"
            )
        num_tokens = lengths.sum()
        if data.packing:
            lengths = padded_length(lengths, data.document_multiple)
        # Slots: places for documents in the packed rows. Each epoch assigns documents to slots of their own length.
        order = _stream(seed, _PACK, index).permutation(len(lengths))
        if data.packing:
            row_of, by_row = pack(lengths[order], data.seq_length)
            order, row_of = order[by_row], row_of[by_row]
        else:
            row_of = np.arange(len(lengths))
        self._row_starts = np.searchsorted(row_of, np.arange(row_of[-1] + 2))
        self._lengths = lengths
        self._slots_by_length = np.argsort(lengths[order], kind="stable")
        self.num_rows = len(self._row_starts) - 1
        self.tokens_per_row = num_tokens / self.num_rows
        empty = np.empty(0, dtype=np.int64)
        self._shuffled = _Shuffled(-1, empty, empty)

    def row(self, ordinal: int) -> np.ndarray:
        """Indices of the documents in the dataset's row number ``ordinal``, counted over all epochs."""
        epoch, place = divmod(ordinal, self.num_rows)
        shuffled = self._shuffled  # one object, so that a thread in another epoch changes nothing here
        if epoch != shuffled.epoch:
            self._shuffled = shuffled = self._shuffle(epoch)
        row = shuffled.row_order[place]
        return shuffled.document_in_slot[self._row_starts[row] : self._row_starts[row + 1]]

    def _shuffle(self, epoch: int) -> _Shuffled:
        generator = _stream(self._seed, _EPOCH, self._index, epoch)
        documents = generator.permutation(len(self._lengths))
        documents = documents[np.argsort(self._lengths[documents], kind="stable")]
        document_in_slot = np.empty(len(documents), dtype=np.int64)
        document_in_slot[self._slots_by_length] = documents
        return _Shuffled(epoch, generator.permutation(self.num_rows), document_in_slot)


def _stream(seed: int, purpose: int, *place: int) -> np.random.Generator:
    """A random stream for one purpose and place; the purpose is part of the key, so no two purposes share a stream."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose, *place)))


def _blend(row_shares: np.ndarray, audio_shares: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The order of datasets in a block.

    Divide a line of length 1 into one interval per dataset, as long as its share, from the dataset with the least audio
    to the one with the most. Row k takes the dataset at the fractional part of k times the golden ratio. Any
    consecutive points of this sequence are spread evenly over the line (low discrepancy: Kuipers and Niederreiter,
    Uniform Distribution of Sequences, chapter 2), so any consecutive rows have nearly each dataset's share and the
    share of audio. The ratio is irrational, so the order is never periodic in the data-parallel size.

    Args:
        row_shares: ``[datasets]`` share of rows, up to a common factor.
        audio_shares: ``[datasets]`` share of audio in each dataset's tokens.

    Returns:
        ``[BLOCK]`` dataset of each row; ``[BLOCK]`` how many rows of that dataset come before it in the block; and
        ``[datasets]`` rows of each dataset in a block (largest remainders, but at least one).
    """
    exact = row_shares / row_shares.sum() * BLOCK
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    missing = BLOCK - int(counts.sum())
    if missing >= 0:
        counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    else:  # the rows of datasets with tiny weights come from the largest dataset
        counts[np.argmax(counts)] += missing
    line = np.argsort(audio_shares, kind="stable")
    points = (np.arange(BLOCK) * _GOLDEN_RATIO + _stream(seed, _BLEND).random()) % 1.0
    dataset_of = np.empty(BLOCK, dtype=np.int32)
    dataset_of[np.argsort(points)] = np.repeat(line, counts[line])
    rank = np.empty(BLOCK, dtype=np.int64)
    rank[np.argsort(dataset_of, kind="stable")] = np.concatenate([np.arange(count) for count in counts])
    return dataset_of, rank, counts


def weights_for_audio_share(weights: npt.ArrayLike, audio_shares: npt.ArrayLike, target: float) -> np.ndarray:
    """The shares of tokens nearest to ``weights`` for which ``target`` of all tokens is audio.

    Nearest in relative entropy: each weight is multiplied by ``exp(x * audio share)``, with the x that meets the target
    (the exponential tilting of Csiszar, I-divergence geometry of probability distributions, 1975).

    Args:
        weights: ``[datasets]``, positive, up to a common factor.
        audio_shares: ``[datasets]`` share of audio in each dataset's tokens.
        target: share of audio in the tokens of the blend.

    Raises:
        ConfigError: ``target`` is not between the least and the largest share of a dataset.
    """
    shares, base = np.asarray(audio_shares, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    low, high = float(shares.min()), float(shares.max())
    if not low < target < high:
        raise ConfigError(
            f"data.audio_share={target}: must be between {low:.3f} and {high:.3f}, the datasets' audio shares"
        )

    def tilted(x: float) -> np.ndarray:
        logits = np.log(base) + x * shares
        unnormalized = np.exp(logits - logits.max())
        return unnormalized / unnormalized.sum()

    below, above = -1.0, 1.0
    while tilted(below) @ shares > target:
        below *= 2
    while tilted(above) @ shares < target:
        above *= 2
    for _ in range(100):
        middle = (below + above) / 2
        below, above = (middle, above) if tilted(middle) @ shares < target else (below, middle)
    return tilted(below)
