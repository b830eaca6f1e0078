"""Batches: every position is compared with its document, one id at a time."""

import dataclasses

import numpy as np
import pytest
import torch

from megatron_most.config import DataConfig
from megatron_most.data.loading.batch import Batch, make_batch
from megatron_most.data.loading.blend import Row, Rows
from megatron_most.data.storage.documents import TASKS, Document
from megatron_most.vocab import NO_CODE, Modality
from tests.unit.data.tiny import CODEBOOKS, LAYOUTS, hidden_of, layout, parts_of, row_of, write_dataset


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batch")
    return {
        (task, name): write_dataset(folder / f"{task}_{name}", task, 20, layout_name=name)
        for task in TASKS
        for name in LAYOUTS
    }


def one_row(dataset, packing, dropout=0.0) -> Row:
    data = DataConfig(seq_length=80, packing=packing, audio_frame_dropout=dropout)
    return Rows([dataset], [1.0], data, seed=1)[0]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("layout_name", LAYOUTS)
@pytest.mark.parametrize("task", TASKS)
def test_every_position_is_what_its_document_says(datasets, task, layout_name, packing):
    vocab = layout(layout_name)
    row = one_row(datasets[task, layout_name], packing, dropout=0.5)
    batch = make_batch([row], vocab, DataConfig(seq_length=80, packing=packing))
    assert packing is (len(row.lengths) > 1)
    position = 0
    for document, hidden in zip(parts_of(row), hidden_of(row), strict=True):
        for i in range(len(document) - 1):
            shown = document.ids[i]
            if hidden[i] and layout_name.startswith("flat"):
                shown = vocab.frame
            assert batch.ids[0, position] == shown
            assert batch.labels[0, position] == document.ids[i + 1]
            assert batch.loss_mask[0, position] == float(document.loss_mask[i + 1])
            assert batch.modality[0, position] == (Modality.AUDIO if shown >= vocab.begin_of_audio else Modality.TEXT)
            assert not batch.is_padding[0, position]
            if layout_name.startswith("frame"):
                codes = [NO_CODE] * CODEBOOKS if hidden[i] else document.side_codes[i].tolist()
                assert batch.codes[0, position].tolist() == codes
                is_target = document.loss_mask[i + 1]
                label = document.side_codes[i + 1].tolist() if is_target else [NO_CODE] * CODEBOOKS
                assert batch.code_labels[0, position].tolist() == label
            position += 1
    assert batch.is_padding[0, position:].all() and not batch.loss_mask[0, position:].any()
    assert (batch.modality[0, position:] == Modality.TEXT).all()
    assert (batch.task == TASKS.index(task)).all()
    if packing:
        ends = np.cumsum([0, *(len(document) - 1 for document in parts_of(row))]).tolist()
        assert batch.cu_seqlens.tolist() == ends + ([80] if ends[-1] < 80 else [])
    if layout_name == "flat":
        assert batch.codes is None and batch.code_labels is None


def test_frames_that_are_heard_are_no_targets(datasets):
    batch = make_batch([one_row(datasets["asr", "frame"], True)], layout(), DataConfig(seq_length=80, packing=True))
    assert (batch.codes != NO_CODE).any() and (batch.code_labels == NO_CODE).all()


def test_hidden_frames_are_still_predicted(datasets):
    plain = make_batch([one_row(datasets["tts", "frame"], True)], layout(), DataConfig(seq_length=80, packing=True))
    dropped = make_batch(
        [one_row(datasets["tts", "frame"], True, 0.5)], layout(), DataConfig(seq_length=80, packing=True)
    )
    assert torch.equal(plain.code_labels, dropped.code_labels) and torch.equal(plain.labels, dropped.labels)
    assert not torch.equal(plain.codes, dropped.codes) and torch.equal(plain.ids, dropped.ids)


def test_no_loss_crosses_from_one_document_to_the_next(datasets):
    batch = make_batch([one_row(datasets["text_lm", "frame"], True)], layout(), DataConfig(seq_length=80, packing=True))
    starts = batch.cu_seqlens[1:-1].long()
    assert len(starts) > 3
    # The last position of a document predicts its end, never the beginning of the next one.
    assert (batch.labels[0, starts - 1] == 2).all() and not (batch.labels == 1).any()


def test_a_row_that_is_exactly_full_has_no_padding_document(datasets):
    row = one_row(datasets["text_lm", "frame"], True)
    length = sum(len(document) - 1 for document in parts_of(row))
    batch = make_batch([row], layout(), DataConfig(seq_length=length, packing=True))
    assert not batch.is_padding.any() and len(batch.cu_seqlens) == len(row.lengths) + 1


def test_documents_are_padded_to_a_multiple_and_are_otherwise_what_they_were(datasets):
    row = one_row(datasets["tts", "frame"], True, dropout=0.5)
    tight = make_batch([row], layout(), DataConfig(seq_length=80, packing=True))
    padded = make_batch([row], layout(), DataConfig(seq_length=128, packing=True, document_multiple=16))
    assert len(row.lengths) > 1 and padded.cu_seqlens[-1] == 128 and (padded.cu_seqlens % 16 == 0).all()
    is_document = torch.zeros(128, dtype=torch.bool)
    for document, start, end in zip(parts_of(row), padded.cu_seqlens[:-1], padded.cu_seqlens[1:], strict=False):
        assert end - start == -(-(len(document) - 1) // 16) * 16
        is_document[start : start + len(document) - 1] = True
    assert torch.equal(padded.is_padding[0], ~is_document)
    assert not padded.loss_mask[0, ~is_document].any() and (padded.code_labels[0, ~is_document] == NO_CODE).all()
    for name in ("ids", "labels", "loss_mask", "modality", "task", "codes", "code_labels"):
        before, after = getattr(tight, name)[0], getattr(padded, name)[0]
        assert torch.equal(before[~tight.is_padding[0]], after[is_document]), name


def test_a_share_of_positions_keeps_the_boundaries_of_the_row(datasets):
    batch = make_batch([one_row(datasets["tts", "frame"], True)], layout(), DataConfig(seq_length=80, packing=True))
    share = batch.take_positions(torch.tensor([7, 3, 60]))
    assert torch.equal(share.cu_seqlens, batch.cu_seqlens)
    assert torch.equal(share.ids, batch.ids[:, [7, 3, 60]]) and torch.equal(share.codes, batch.codes[:, [7, 3, 60]])


def test_on_a_device_the_boundaries_of_the_row_stay_with_the_host(datasets):
    """Copying them back would make the host wait for the device in every micro-batch."""
    batch = make_batch([one_row(datasets["tts", "frame"], True)], layout(), DataConfig(seq_length=80, packing=True)).to(
        "meta"
    )
    tensors = {name: tensor for name, tensor in vars(batch).items() if tensor is not None}
    assert {name for name, tensor in tensors.items() if tensor.device.type != "meta"} == {"cu_seqlens", "predicts"}


def test_a_share_takes_its_positions_and_its_packed_row_to_a_device_as_they_are(datasets):
    batch = make_batch([one_row(datasets["tts", "frame"], True)], layout(), DataConfig(seq_length=80, packing=True))
    positions, packed_row = torch.tensor([7, 3, 60]), object()
    share = dataclasses.replace(batch.take_positions(positions), packed_row=packed_row)
    moved = share.to("meta")
    assert moved.positions is positions and moved.packed_row is packed_row and moved.predicts is share.predicts
    assert moved.codes.device.type == moved.is_padding.device.type == "meta"


@pytest.mark.parametrize("name", ["frame", "frame_delay", "flat"])
def test_targets_are_the_positions_of_the_mask_as_hidden_states_number_them(datasets, name):
    rows = [one_row(datasets["tts", name], False), one_row(datasets["asr", name], False)]
    batch = make_batch(rows, layout(name), DataConfig(seq_length=80, packing=False))
    targets = batch.targets()
    places = [(s, b) for s in range(80) for b in range(2) if batch.loss_mask[b, s]]
    assert 0 < len(places) < 160
    assert targets.index.tolist() == [2 * s + b for s, b in places]
    assert targets.labels.tolist() == [int(batch.labels[b, s]) for s, b in places]
    if name == "flat":
        assert targets.code_index is None and targets.code_labels is None
        return
    coded = [(s, b) for s, b in places if (batch.code_labels[b, s] != NO_CODE).any()]
    assert 0 < len(coded) < len(places)
    assert targets.code_index.tolist() == [2 * s + b for s, b in coded]
    assert targets.code_labels.tolist() == [batch.code_labels[b, s].tolist() for s, b in coded]


def test_targets_of_a_share_are_those_of_its_positions(datasets):
    batch = make_batch([one_row(datasets["tts", "frame"], True)], layout(), DataConfig(seq_length=80, packing=True))
    share = batch.take_positions(torch.arange(79, -1, -3))
    assert share.targets().index.tolist() == share.loss_mask[0].nonzero()[:, 0].tolist()
    assert torch.equal(share.targets().labels, share.labels[share.loss_mask > 0])


def test_targets_follow_the_mask(datasets):
    batch = make_batch([one_row(datasets["tts", "frame"], True)], layout(), DataConfig(seq_length=80, packing=True))
    without = dataclasses.replace(batch, loss_mask=torch.zeros_like(batch.loss_mask)).targets()
    assert without.index.numel() == without.code_index.numel() == 0
    everywhere = dataclasses.replace(batch, loss_mask=torch.ones_like(batch.loss_mask)).targets()
    assert everywhere.index.tolist() == list(range(80))


@pytest.mark.parametrize("packing", [True, False])
def test_a_row_without_documents_is_all_padding(packing):
    batch = make_batch([Row(0)], layout(), DataConfig(seq_length=8, packing=packing))
    assert batch.is_padding.all() and not batch.loss_mask.any() and (batch.code_labels == NO_CODE).all()
    assert batch.cu_seqlens is None or batch.cu_seqlens.tolist() == [0, 8]


def test_types_and_shapes(datasets):
    rows = [one_row(datasets["tts", "frame"], False), one_row(datasets["asr", "frame"], False)]
    batch = make_batch(rows, layout(), DataConfig(seq_length=80, packing=False)).to("cpu")
    assert isinstance(batch, Batch) and batch.cu_seqlens is None
    for name in ("ids", "labels", "modality", "task"):
        assert getattr(batch, name).shape == (2, 80) and getattr(batch, name).dtype == torch.int64
    assert batch.loss_mask.dtype == torch.float32 and batch.is_padding.dtype == torch.bool
    assert batch.codes.shape == batch.code_labels.shape == (2, 80, CODEBOOKS)
    assert batch.task[:, 0].tolist() == [1, 0]


def test_boundaries_have_the_type_that_attention_kernels_take(datasets):
    batch = make_batch([one_row(datasets["tts", "frame"], True)], layout(), DataConfig(seq_length=80, packing=True))
    assert batch.cu_seqlens.dtype == torch.int32 and batch.predicts.dtype == torch.uint8


def test_the_first_position_of_a_document_is_predicted_by_none():
    vocab = layout()
    ids, side_codes = vocab.codec_layout.encode(np.ones((4, CODEBOOKS), dtype=np.int64))
    document = Document(ids, np.ones(4, dtype=bool), np.arange(4), side_codes)
    batch = make_batch([row_of([document, document])], vocab, DataConfig(seq_length=6, packing=True))
    assert (batch.code_labels == 1).all() and batch.cu_seqlens.tolist() == [0, 3, 6]
    batch = make_batch(
        [row_of([document, document])], vocab, DataConfig(seq_length=8, packing=True, document_multiple=4)
    )
    assert (batch.code_labels[0, [3, 7]] == NO_CODE).all()


def test_hiding_the_last_position_of_a_document_hides_nothing_of_the_next():
    vocab = layout()
    ids, side_codes = vocab.codec_layout.encode(np.ones((4, CODEBOOKS), dtype=np.int64))
    row = row_of([Document(ids, np.ones(4, dtype=bool), np.arange(4), side_codes)] * 2)
    row.hidden = np.arange(8) == 3
    batch = make_batch([row], vocab, DataConfig(seq_length=6, packing=True))
    assert (batch.codes == 1).all()
