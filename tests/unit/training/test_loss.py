"""The arithmetic of losses, on numbers small enough to check by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_most.data.loading.batch import Batch
from megatron_most.data.storage.documents import TASKS
from megatron_most.errors import ConfigError
from megatron_most.training.loss import LossTable
from megatron_most.vocab import NO_CODE, ModalityRange, VocabLayout

FRAME = VocabLayout(text_vocab_size=10, num_codebooks=2, codebook_size=4, layout="frame")
FLAT = VocabLayout(text_vocab_size=10, num_codebooks=2, codebook_size=4, layout="flat")


def make_batch(labels: list[int], mask: list[int], tasks: list[str], codes: list[list[int]] | None) -> Batch:
    row = torch.tensor([labels])
    return Batch(
        ids=row,
        labels=row,
        loss_mask=torch.tensor([mask], dtype=torch.float32),
        modality=torch.zeros_like(row),
        is_padding=torch.tensor([[False] * (len(labels) - 1) + [True]]),
        task=torch.tensor([[TASKS.index(task) for task in tasks]]),
        codes=None,
        code_labels=None if codes is None else torch.tensor([codes]),
        cu_seqlens=None,
    )


def reduce(table: LossTable, batch: Batch, slots: list[list[float]]) -> tuple[float, int, dict[str, tuple]]:
    loss_sum, count, rows = table(batch, torch.tensor([slots], requires_grad=True))
    return loss_sum.item(), count.item(), dict(zip(table.names, map(tuple, rows.tolist()), strict=True))


def test_frame_layout_by_hand() -> None:
    none = [NO_CODE, NO_CODE]
    batch = make_batch(
        labels=[3, FRAME.frame, FRAME.end_of_audio, FRAME.frame, 5],
        mask=[1, 1, 1, 0, 0],
        tasks=["asr", "tts", "tts", "tts", "tts"],
        codes=[none, [1, 2], none, none, none],
    )
    slots = [[1.0, 0, 0], [2.0, 10.0, 20.0], [4.0, 0, 0], [100.0, 0, 0], [100.0, 0, 0]]
    loss_sum, count, rows = reduce(LossTable(FRAME, [0.5, 0.25]), batch, slots)
    assert (loss_sum, count) == (1 + (2 + 5 + 5) + 4, 3)
    assert rows == {
        **{f"loss/{task}": (0, 0) for task in TASKS},
        "loss": (17, 3),
        "loss/text": (1, 1),
        "loss/audio": (16, 2),
        "loss/asr": (1, 1),
        "loss/tts": (16, 2),
        "loss/codebook_0": (10, 1),
        "loss/codebook_1": (20, 1),
        "tokens": (4, 1),
    }


def test_flat_layout_tells_codebooks_by_id() -> None:
    first = FLAT.frame + 1
    batch = make_batch([first + 1, first + 4, first + 7, 3, FLAT.end_of_audio], [1, 1, 1, 1, 1], ["tts"] * 5, None)
    loss_sum, count, rows = reduce(LossTable(FLAT, [1.0, 1.0]), batch, [[1.0], [2.0], [4.0], [8.0], [16.0]])
    assert (loss_sum, count) == (31, 5)
    assert rows["loss/text"] == (8, 1)
    assert rows["loss/audio"] == (23, 4)
    assert rows["loss/codebook_0"] == (1, 1)
    assert rows["loss/codebook_1"] == (6, 2)


def test_gradient_is_the_weight_of_each_slot_where_the_mask_is_one() -> None:
    batch = make_batch([3, FRAME.frame], [0, 1], ["tts", "tts"], [[NO_CODE, NO_CODE], [1, 2]])
    slots = torch.ones(1, 2, 3, requires_grad=True)
    loss_sum, _, table = LossTable(FRAME, [0.5, 0.25])(batch, slots)
    loss_sum.backward()
    assert slots.grad.tolist() == [[[0, 0, 0], [1, 0.5, 0.25]]]
    assert not table.requires_grad


@pytest.mark.parametrize("pieces", [2, 4])
def test_sums_do_not_depend_on_the_split(pieces: int) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, FRAME.size, (4, 8), generator=generator)
    codes = torch.randint(0, 4, (4, 8, 2), generator=generator).masked_fill((labels != FRAME.frame)[..., None], NO_CODE)
    batch = Batch(
        ids=labels,
        labels=labels,
        loss_mask=torch.randint(0, 2, (4, 8), generator=generator).float(),
        modality=torch.zeros_like(labels),
        is_padding=torch.zeros_like(labels, dtype=torch.bool),
        task=torch.randint(0, len(TASKS), (4, 8), generator=generator),
        codes=codes,
        code_labels=codes,
        cu_seqlens=None,
    )
    slots = torch.rand(4, 8, 3, generator=generator)
    table = LossTable(FRAME, [1.0, 2.0])
    whole = table(batch, slots)
    parts = []
    for rows in torch.arange(4).chunk(pieces):
        values = {name: value[rows] for name, value in vars(batch).items() if value is not None}
        parts.append(table(dataclasses.replace(batch, **values), slots[rows]))
    for index in range(3):
        torch.testing.assert_close(sum(part[index] for part in parts), whole[index])


def test_text_weight_scales_text_targets_of_the_training_loss_and_no_metric() -> None:
    none = [NO_CODE, NO_CODE]
    batch = make_batch(
        labels=[3, FRAME.frame, 5], mask=[1, 1, 0], tasks=["tts", "tts", "tts"], codes=[none, [1, 2], none]
    )
    slots = [[1.0, 0, 0], [2.0, 10.0, 20.0], [100.0, 0, 0]]
    plain_sum, count, plain_rows = reduce(LossTable(FRAME, [1.0, 1.0]), batch, slots)
    weighted_sum, weighted_count, rows = reduce(LossTable(FRAME, [1.0, 1.0], text_weight=3.0), batch, slots)
    assert (plain_sum, weighted_sum) == (1 + 32, 3 + 32)
    assert (count, plain_rows) == (weighted_count, rows)


def test_every_modality_has_a_row_of_its_targets() -> None:
    image = ModalityRange("image", 4, 8)
    vocab = VocabLayout(text_vocab_size=10, num_codebooks=2, codebook_size=4, further_modalities=[image])
    none = [NO_CODE, NO_CODE]
    batch = make_batch([3, 4, 7, vocab.frame], [1, 1, 1, 1], ["text_lm"] * 4, [none, none, none, [1, 2]])
    table = LossTable(vocab, [1.0, 1.0], text_weight=3.0)
    loss_sum, _, rows = reduce(table, batch, [[1.0, 0, 0], [2.0, 0, 0], [4.0, 0, 0], [8.0, 16.0, 32.0]])
    assert (rows["loss/text"], rows["loss/image"], rows["loss/audio"]) == ((1, 1), (6, 2), (56, 1))
    assert loss_sum == 3 * 1 + 6 + 56


def test_a_modality_called_as_a_task_is_refused() -> None:
    vocab = VocabLayout(10, 2, 4, further_modalities=[ModalityRange("asr", 4, 8)])
    with pytest.raises(ConfigError, match="vocab.further_modalities: asr is the name of a task or codebook"):
        LossTable(vocab, [1.0, 1.0])


def test_a_code_that_is_an_id_counts_as_its_codebook_weighs() -> None:
    first = FLAT.frame + 1
    batch = make_batch([first + 1, first + 4, 3, FLAT.end_of_audio, 5], [1, 1, 1, 1, 0], ["tts"] * 5, None)
    slots = [[1.0], [2.0], [4.0], [8.0], [16.0]]
    loss_sum, _, rows = reduce(LossTable(FLAT, [0.5, 3.0]), batch, slots)
    assert loss_sum == 0.5 * 1 + 3 * 2 + 4 + 8
    assert rows["loss/audio"] == (0.5 + 6 + 8, 3)
    assert (rows["loss/codebook_0"], rows["loss/codebook_1"]) == ((1, 1), (2, 1))


@pytest.mark.parametrize("num_codebooks", [1, 2])
def test_flat_labels_at_the_edges_of_the_codes(num_codebooks: int) -> None:
    vocab = VocabLayout(text_vocab_size=10, num_codebooks=num_codebooks, codebook_size=4, layout="flat")
    first = vocab.codec_layout.first_code_id
    last = first + 4 * num_codebooks - 1
    batch = make_batch(
        labels=[first - 1, first, last, last + 1, 5], mask=[1, 1, 1, 1, 0], tasks=["tts"] * 5, codes=None
    )
    weights = [0.5, 0.25][:num_codebooks]
    loss_sum, count, rows = reduce(LossTable(vocab, weights), batch, [[1.0], [2.0], [4.0], [8.0], [100.0]])
    assert (loss_sum, count) == (1 + 2 * 0.5 + 4 * weights[-1] + 8, 4)
    of_codebooks = [rows[f"loss/codebook_{index}"] for index in range(num_codebooks)]
    assert of_codebooks == ([(6, 2)] if num_codebooks == 1 else [(2, 1), (4, 1)])
