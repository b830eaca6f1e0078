"""Rows of documents -> the tensors of one micro-batch.

Shape letters: b rows, s positions of a row, C codebooks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_most.data.loading.blend import Row
from megatron_most.data.loading.packing import padded_length
from megatron_most.vocab import NO_CODE, VocabLayout

PADDING_ID = 0
"""Any text id does: padding is told by ``is_padding``, never by the id."""


@dataclass
class Batch:
    """One micro-batch. Position i reads ``ids[:, i]`` and predicts ``labels[:, i]``, the next id of the same document.

    ids, labels: ``[b, s]`` int64.
    loss_mask: ``[b, s]`` float32, 1 where the label is a target.
    modality: ``[b, s]`` int64, :class:`~megatron_most.vocab.Modality` of the input id; text on padding.
    is_padding: ``[b, s]`` bool.
    task: ``[b, s]`` int64, index into :data:`~megatron_most.data.building.tasks.TASKS`.
    codes: ``[b, s, C]`` int64, codes of the input frame; ``NO_CODE`` where there is none or it is hidden. None in the
        ``flat`` layout.
    code_labels: ``[b, s, C]`` int64, codes of the label; ``NO_CODE`` where it is no frame or no target. None in the
        ``flat`` layout.
    cu_seqlens: ``[documents + 1]`` int32, where documents begin and end in a packed row (b is 1), with the padding that
        brings each to ``data.document_multiple``; padding at the end of the row counts as a document. It describes the
        whole row also where a batch holds a share of its positions. None when rows hold one document each.
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

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; ``cu_seqlens`` stays, for the host reads the numbers in it."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved = {
            name: value.to(device, non_blocking=True)
            for name, value in values.items()
            if value is not None and name != "cu_seqlens"
        }
        return dataclasses.replace(self, **moved)

    def take_positions(self, positions: torch.Tensor) -> Batch:
        """The batch with ``positions [k]`` only, along s: the share of a context-parallel rank."""
        positions = positions.to(self.ids.device)
        tensors = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        taken = {
            name: tensor.index_select(1, positions)
            for name, tensor in tensors.items()
            if tensor is not None and name != "cu_seqlens"
        }
        return dataclasses.replace(self, **taken)


def make_batch(
    rows: Sequence[Row], vocab: VocabLayout, *, seq_length: int, packing: bool, document_multiple: int = 1
) -> Batch:
    """Lay ``rows`` out as ``[len(rows), seq_length]``; a row without documents is all padding.

    Args:
        packing: several documents in a row.
        document_multiple: each packed document is padded at its end to a multiple of that many positions.
    """
    assert len(rows) == 1 or not packing, "a packed batch has one row"
    shape = (len(rows), seq_length)
    ids, labels, task = np.full((3, *shape), PADDING_ID, dtype=np.int64)
    loss_mask = np.zeros(shape, dtype=np.float32)
    is_padding = np.ones(shape, dtype=bool)
    codes = code_labels = None
    layout = vocab.codec_layout
    if layout.uses_side_codes:
        codes, code_labels = np.full((2, *shape, vocab.num_codebooks), NO_CODE, dtype=np.int64)
    boundaries = [0]
    for index, row in enumerate(rows):
        task[index] = row.task
        if row.documents is None:
            boundaries.append(seq_length)
            continue
        documents, lengths = row.documents, row.documents.lengths
        stops, taken = np.cumsum(lengths), padded_length(lengths - 1, document_multiple)
        ends = np.cumsum(taken)
        # The last id of a document is not read, only predicted.
        is_read = np.ones(len(documents.ids), dtype=bool)
        is_read[stops - 1] = False
        last_read = np.cumsum(lengths - 1) - 1
        target: slice | np.ndarray = slice(0, last_read[-1] + 1)
        if document_multiple > 1 or codes is not None or row.hidden is not None:
            # Position p is read at place[p] and, but for the first of a document, predicted one before.
            place = np.arange(len(documents.ids)) + np.repeat(ends - taken - (stops - lengths), lengths)
            target = place[is_read] if document_multiple > 1 else target
        read, predicted = _read_and_predicted(documents.ids, is_read, last_read, stops)
        ids[index, target], labels[index, target] = read, predicted
        loss_mask[index, target] = _read_and_predicted(documents.loss_mask, is_read, last_read, stops)[1]
        is_padding[index, target] = False
        if codes is not None and len(documents.codes):
            coded = documents.coded
            at, has_loss = place[coded], documents.loss_mask[coded]
            _scatter(codes[index], at, documents.codes, is_read[coded])
            if has_loss.any():  # what is only heard has no labels
                _scatter(code_labels[index], at - 1, documents.codes, has_loss & is_read[coded - 1])
        if row.hidden is not None:
            hidden = place[row.hidden & is_read]
            if codes is not None:
                codes[index, hidden] = NO_CODE
            else:
                ids[index, hidden] = vocab.frame
        boundaries += ends.tolist()
        if boundaries[-1] < seq_length:
            boundaries.append(seq_length)
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
        cu_seqlens=as_tensor(np.array(boundaries, dtype=np.int32)) if packing else None,
    )


def _read_and_predicted(
    values: np.ndarray, is_read: np.ndarray, last_read: np.ndarray, stops: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """``values [n]`` of all positions -> those of the positions that are read, and of the position after each."""
    read = values[is_read]
    following = np.empty_like(read)
    following[:-1] = read[1:]
    following[last_read] = values[stops - 1]
    return read, following


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
