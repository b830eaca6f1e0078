"""Rows of documents -> the tensors of one micro-batch.

Shape letters: b rows, s positions of a row, C codebooks; of all positions, t have a target and c a target with codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_most.config import DataConfig
from megatron_most.data.loading.blend import Row
from megatron_most.data.loading.packing import padded_length
from megatron_most.vocab import NO_CODE, VocabLayout

PADDING_ID = 0
"""Any text id would do: ``is_padding`` marks padding, not the id."""


@dataclass(frozen=True)
class Targets:
    """The targets of a micro-batch. Positions are indices into hidden states ``[s, b]``, flattened to ``[s * b]``.

    index, labels: ``[t]`` int64, the positions that have a target, ascending, and their labels.
    code_index: ``[c]`` int64, those whose target has codes. None in the ``flat`` layouts.
    code_labels: ``[c, C]`` int64, ``NO_CODE`` for codebooks without a label there. None in the ``flat`` layouts.
    """

    index: torch.Tensor
    labels: torch.Tensor
    code_index: torch.Tensor | None
    code_labels: torch.Tensor | None


@dataclass
class Batch:
    """One micro-batch. Position i has input ``ids[:, i]`` and label ``labels[:, i]``, the next id of the same document.

    ids, labels: ``[b, s]`` int64.
    loss_mask: ``[b, s]`` float32, 1 where the label is a target.
    modality: ``[b, s]`` int64, :class:`~megatron_most.vocab.Modality` of the input id; padding is text.
    is_padding: ``[b, s]`` bool.
    task: ``[b, s]`` int64, index into :data:`~megatron_most.data.storage.documents.TASKS`.
    codes: ``[b, s, C]`` int64, codes of the input; ``NO_CODE`` if it is no frame or is hidden. None in the ``flat``
        layouts.
    code_labels: ``[b, s, C]`` int64, codes of the label; ``NO_CODE`` if it is no frame or no target. None in the
        ``flat`` layouts.
    cu_seqlens: ``[documents + 1]`` int32, the boundaries of the documents of a packed row (b is 1), each padded to a
        multiple of ``data.document_multiple``; padding at the end of the row counts as a document. The boundaries are
        those of the whole row, even if the batch holds only some of its positions. None without packing.
    predicts: ``[b, s]`` uint8 on the host: 0 without a target, 1 for an id, 2 for an id with codes. Computed from
        ``loss_mask`` and ``code_labels``.
    positions: ``[s]`` int64 on the host, the positions of the whole row that the batch holds; None if it holds all.
    packed_row: what the model derives from ``cu_seqlens`` for all its layers; None until it is computed.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    modality: torch.Tensor
    is_padding: torch.Tensor
    task: torch.Tensor
    codes: torch.Tensor | None = None
    code_labels: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    predicts: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    packed_row: object | None = None

    def __post_init__(self) -> None:
        if self.predicts is None or self.loss_mask.device.type == "cpu":
            is_target = self.loss_mask > 0
            predicts = is_target.byte()
            if self.code_labels is not None:
                # NO_CODE is less than every code. The maximum takes less than half the time of a comparison.
                predicts += is_target & (self.code_labels.amax(dim=-1) != NO_CODE)
            self.predicts = predicts.cpu()

    def to(self, device: torch.device | str) -> Batch:
        """The batch on ``device``, except ``predicts``, ``cu_seqlens`` and ``positions``, which the host reads."""
        device = torch.device(device)
        moved = {name: to_device(value, device) for name, value in self._by_position() if name != "predicts"}
        return dataclasses.replace(self, **moved)

    def take_positions(self, positions: torch.Tensor) -> Batch:
        """The batch at ``positions [k]`` (on the host) of the whole row: the share of a context-parallel rank."""
        assert self.positions is None, "the batch is a share already"
        on_device = to_device(positions, self.ids.device)
        taken = {
            name: tensor.index_select(1, positions if name == "predicts" else on_device)
            for name, tensor in self._by_position()
        }
        return dataclasses.replace(self, positions=positions, **taken)

    def _by_position(self) -> list[tuple[str, torch.Tensor]]:
        """Name and tensor of every field that has a value per position."""
        values = [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]
        others = ("cu_seqlens", "positions", "packed_row")
        return [(name, value) for name, value in values if name not in others and value is not None]

    def targets(self) -> Targets:
        """The targets. Their positions are found on the host, so that it never waits for the device."""
        assert self.predicts is not None, "computed in __post_init__"
        predicts = self.predicts.transpose(0, 1).flatten()
        places = [predicts.nonzero()[:, 0]]
        if self.code_labels is not None:
            places.append((predicts == 2).nonzero()[:, 0])
        index, *rest = to_device(torch.cat(places), self.ids.device).split([len(place) for place in places])
        labels = self.labels.transpose(0, 1).flatten().index_select(0, index)
        if self.code_labels is None:
            return Targets(index, labels, None, None)
        (code_index,) = rest
        code_labels = self.code_labels.transpose(0, 1).flatten(0, 1).index_select(0, code_index)
        return Targets(index, labels, code_index, code_labels)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on ``device``. Copies from the host to a GPU are pinned and asynchronous."""
    pinned = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
    return pinned.to(device, non_blocking=True)


def make_batch(rows: Sequence[Row], vocab: VocabLayout, data: DataConfig) -> Batch:
    """Lay ``rows`` out as ``[len(rows), data.seq_length]``; a row without a document is all padding."""
    assert len(rows) == 1 or not data.packing, "a packed batch has one row"
    shape = (len(rows), data.seq_length)
    arrays: dict[str, np.ndarray] = {
        "ids": np.full(shape, PADDING_ID, dtype=np.int64),
        "labels": np.full(shape, PADDING_ID, dtype=np.int64),
        "loss_mask": np.zeros(shape, dtype=np.float32),
        "is_padding": np.ones(shape, dtype=bool),
        "task": np.repeat(np.array([[row.task] for row in rows]), data.seq_length, axis=1),
    }
    if vocab.codec_layout.uses_side_codes:
        for name in ("codes", "code_labels"):
            arrays[name] = np.full((*shape, vocab.num_codebooks), NO_CODE, dtype=np.int64)
    boundaries = [0]
    for index, row in enumerate(rows):
        row_arrays = {name: array[index] for name, array in arrays.items()}
        boundaries += _lay_out(row, row_arrays, vocab, data.document_multiple)
    if boundaries[-1] < data.seq_length:
        boundaries.append(data.seq_length)
    arrays["modality"] = vocab.modality_of(arrays["ids"]).astype(np.int64, copy=False)
    if data.packing:
        arrays["cu_seqlens"] = np.array(boundaries, dtype=np.int32)
    return Batch(**{name: torch.from_numpy(array) for name, array in arrays.items()})


def _lay_out(row: Row, arrays: dict[str, np.ndarray], vocab: VocabLayout, document_multiple: int) -> list[int]:
    """Write the documents of a row, one after another, into ``arrays`` of ``[s]`` and ``[s, C]``.

    Returns:
        Where each document ends, including its padding to a multiple of ``document_multiple``.
    """
    ends: list[int] = []
    document = row.document
    if document is None:
        return ends
    ids, codes = document.ids, document.side_codes
    input_ids, input_codes = ids, codes
    if row.hidden is not None:
        if codes is None:
            input_ids = np.where(row.hidden, vocab.frame, ids)
        else:
            input_codes = np.where(row.hidden[:, None], NO_CODE, codes)
    predicts_codes = document.coded is not None and document.loss_mask[document.coded].any()  # often not; saves time
    stop = place = 0
    for length in row.lengths.tolist():
        start, stop = stop, stop + length
        inputs, targets = slice(start, stop - 1), slice(start + 1, stop)
        read = slice(place, place + length - 1)
        is_target = document.loss_mask[targets]
        arrays["ids"][read] = input_ids[inputs]
        arrays["labels"][read] = ids[targets]
        arrays["loss_mask"][read] = is_target
        arrays["is_padding"][read] = False
        if codes is not None and input_codes is not None:
            arrays["codes"][read] = input_codes[inputs]
            if predicts_codes:
                np.copyto(arrays["code_labels"][read], codes[targets], where=is_target[:, None])
        place += padded_length(length - 1, document_multiple)
        ends.append(place)
    return ends
