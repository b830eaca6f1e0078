"""Rows of documents -> the tensors of one micro-batch.

Shape letters: b rows, s positions of a row, n positions of its documents, r of them that are read, C codebooks;
t positions of all rows that have a target, c of them that have codes as well.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_most.config import DataConfig
from megatron_most.data.loading.blend import Row
from megatron_most.data.loading.packing import padded_length
from megatron_most.data.storage.documents import Document
from megatron_most.vocab import NO_CODE, VocabLayout

PADDING_ID = 0
"""Any text id does: padding is told by ``is_padding``, never by the id."""


_ON_HOST = ("cu_seqlens", "predicts")
"""Fields that stay with the host, which reads the numbers in them: it would wait for the device to have them back."""


@dataclass(frozen=True)
class Targets:
    """What a micro-batch predicts and where. Positions are numbered as hidden states ``[s, b]`` lie in memory.

    index, labels: ``[t]`` int64, the positions that have a target, in order, and the ids to predict there.
    code_index: ``[c]`` int64, those whose target has codes. None in the ``flat`` layout.
    code_labels: ``[c, C]`` int64, ``NO_CODE`` where there is a label for other codebooks only. None as before.
    """

    index: torch.Tensor
    labels: torch.Tensor
    code_index: torch.Tensor | None
    code_labels: torch.Tensor | None


@dataclass
class Batch:
    """One micro-batch. Position i reads ``ids[:, i]`` and predicts ``labels[:, i]``, the next id of the same document.

    ids, labels: ``[b, s]`` int64.
    loss_mask: ``[b, s]`` float32, 1 where the label is a target.
    modality: ``[b, s]`` int64, :class:`~megatron_most.vocab.Modality` of the input id; text on padding.
    is_padding: ``[b, s]`` bool.
    task: ``[b, s]`` int64, index into :data:`~megatron_most.data.storage.documents.TASKS`.
    codes: ``[b, s, C]`` int64, codes of the input frame; ``NO_CODE`` where there is none or it is hidden. None in the
        ``flat`` layout.
    code_labels: ``[b, s, C]`` int64, codes of the label; ``NO_CODE`` where it is no frame or no target. None in the
        ``flat`` layout.
    cu_seqlens: ``[documents + 1]`` int32, where documents begin and end in a packed row (b is 1), with the padding that
        brings each to ``data.document_multiple``; padding at the end of the row counts as a document. It describes the
        whole row also where a batch holds a share of its positions. None when rows hold one document each.
    predicts: ``[b, s]`` uint8 on the host: whether a position predicts nothing (0), an id (1), or codes as well (2).
        It follows from ``loss_mask`` and ``code_labels``.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    modality: torch.Tensor
    is_padding: torch.Tensor
    task: torch.Tensor
    codes: torch.Tensor | None
    code_labels: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    predicts: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.predicts is None or self.loss_mask.device.type == "cpu":
            is_target = self.loss_mask > 0
            predicts = is_target.byte()
            if self.code_labels is not None:
                predicts += is_target & (self.code_labels != NO_CODE).any(dim=-1)
            self.predicts = predicts.cpu()

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device, but for ``cu_seqlens`` and ``predicts``."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved = {
            name: value.to(device, non_blocking=True)
            for name, value in values.items()
            if value is not None and name not in _ON_HOST
        }
        return dataclasses.replace(self, **moved)

    def take_positions(self, positions: torch.Tensor) -> Batch:
        """The batch with ``positions [k]`` (on the host) only, along s: the share of a context-parallel rank."""
        on_device = _to_device(positions, self.ids.device)
        tensors = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        taken = {
            name: tensor.index_select(1, positions if name == "predicts" else on_device)
            for name, tensor in tensors.items()
            if tensor is not None and name != "cu_seqlens"
        }
        return dataclasses.replace(self, **taken)

    def targets(self) -> Targets:
        """The positions that predict something, found on the host, and their labels. It never waits for the device."""
        predicts = self.predicts.transpose(0, 1).flatten()
        places = [predicts.nonzero()[:, 0]]
        if self.code_labels is not None:
            places.append((predicts == 2).nonzero()[:, 0])
        index, *rest = _to_device(torch.cat(places), self.ids.device).split([len(place) for place in places])
        labels = self.labels.transpose(0, 1).flatten().index_select(0, index)
        if not rest:
            return Targets(index, labels, None, None)
        (code_index,) = rest
        code_labels = self.code_labels.transpose(0, 1).flatten(0, 1).index_select(0, code_index)
        return Targets(index, labels, code_index, code_labels)


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of a tensor of the host for which the host does not wait."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def make_batch(rows: Sequence[Row], vocab: VocabLayout, data: DataConfig) -> Batch:
    """Lay ``rows`` out as ``[len(rows), data.seq_length]``; a row without documents is all padding."""
    assert len(rows) == 1 or not data.packing, "a packed batch has one row"
    shape = (len(rows), data.seq_length)
    ids, labels, task = np.full((3, *shape), PADDING_ID, dtype=np.int64)
    loss_mask = np.zeros(shape, dtype=np.float32)
    is_padding = np.ones(shape, dtype=bool)
    codes = code_labels = None
    if vocab.codec_layout.uses_side_codes:
        codes, code_labels = np.full((2, *shape, vocab.num_codebooks), NO_CODE, dtype=np.int64)
    boundaries = [0]
    for index, row in enumerate(rows):
        task[index] = row.task
        if row.document is not None:
            document, places = row.document, _Places(row.lengths, data.document_multiple)
            read = places.read
            ids[index, read] = document.ids[places.is_read]
            labels[index, read] = places.of_next(document.ids)
            loss_mask[index, read] = places.of_next(document.loss_mask)
            is_padding[index, read] = False
            if codes is not None:
                _lay_codes_out(document, places, codes[index], code_labels[index])
            if row.hidden is not None:
                hidden = places.of_all[row.hidden & places.is_read]
                if codes is not None:
                    codes[index, hidden] = NO_CODE
                else:
                    ids[index, hidden] = vocab.frame
            boundaries += places.ends.tolist()
        if boundaries[-1] < data.seq_length:
            boundaries.append(data.seq_length)
    as_tensor = torch.from_numpy
    return Batch(
        ids=as_tensor(ids),
        labels=as_tensor(labels),
        loss_mask=as_tensor(loss_mask),
        modality=as_tensor(vocab.modality_of(ids).astype(np.int64, copy=False)),
        is_padding=as_tensor(is_padding),
        task=as_tensor(task),
        codes=None if codes is None else as_tensor(codes),
        code_labels=None if code_labels is None else as_tensor(code_labels),
        cu_seqlens=as_tensor(np.array(boundaries, dtype=np.int32)) if data.packing else None,
    )


class _Places:
    """Where the documents of a row stand in it. All positions but the last of each document are read.

    Args:
        lengths: positions of each document; they sum to n.
        document_multiple: each is padded at its end to a multiple of that many positions.

    Attributes:
        ends: where each document and its padding end in the row.
        is_read: ``[n]`` bool, the positions that are read, r of them.
    """

    def __init__(self, lengths: np.ndarray, document_multiple: int) -> None:
        stops, taken = np.cumsum(lengths), padded_length(lengths - 1, document_multiple)
        self.ends = np.cumsum(taken)
        self.is_read = np.ones(stops[-1], dtype=bool)
        self.is_read[stops - 1] = False
        self._lengths, self._shifts = lengths, self.ends - taken - (stops - lengths)
        self._is_padded = document_multiple > 1

    @functools.cached_property
    def of_all(self) -> np.ndarray:
        """``[n]``: where each position is read; one before it is where it is predicted, unless it is a first one."""
        return np.arange(len(self.is_read)) + np.repeat(self._shifts, self._lengths)

    @property
    def read(self) -> slice | np.ndarray:
        """The r places at which something is read."""
        return self.of_all[self.is_read] if self._is_padded else slice(0, len(self.is_read) - len(self._lengths))

    def of_next(self, values: np.ndarray) -> np.ndarray:
        """Of ``values [n]``, those of the positions that follow one that is read: ``[r]``."""
        return values[1:][self.is_read[:-1]]


def _lay_codes_out(document: Document, places: _Places, codes: np.ndarray, code_labels: np.ndarray) -> None:
    """Put a row's codes where they are read, into ``codes [s, C]``, and predicted, into ``code_labels [s, C]``."""
    coded = document.coded
    if not len(coded):
        return
    at, has_loss = places.of_all[coded], document.loss_mask[coded]
    _scatter(codes, at, document.codes, places.is_read[coded])
    if has_loss.any():  # what is only heard has no labels
        _scatter(code_labels, at - 1, document.codes, has_loss & places.is_read[coded - 1])


def _scatter(rows: np.ndarray, places: np.ndarray, values: np.ndarray, chosen: np.ndarray) -> None:
    """``rows[places[i]] = values[i]`` for each i that is ``chosen``; ``places`` ascend."""
    if not chosen.all():
        places, values = places[chosen], values[chosen]
    if not len(places):
        return
    # Audio stands in runs of places: copying each run is quicker than looking up every place.
    edges = (np.flatnonzero(places[1:] - places[:-1] != 1) + 1).tolist()
    starts, stops = [0, *edges], [*edges, len(places)]
    for place, start, stop in zip(places[starts].tolist(), starts, stops, strict=True):
        rows[place : place + stop - start] = values[start:stop]
