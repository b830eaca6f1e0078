"""Micro-batches on one rank: which positions it takes, what it counts, and what a sum over ranks begins with.

``tests/distributed/`` compares several ranks. A mutation tool sees only what runs here.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from megatron.core import parallel_state

from megatron_most import parallel
from megatron_most.data.loading.batch import Batch
from megatron_most.model.packed_row import PackedRow
from megatron_most.training import microbatches
from megatron_most.training.microbatches import (
    context_share,
    packed_seq_params,
    run_microbatches,
    stage,
    sum_over_ranks,
)
from megatron_most.training.train_step import TrainState, build_train_state
from tests.distributed.tiny import tiny_batch, tiny_config

PACKED = {"data__packing": True, "training__micro_batch_size": 1, "data__document_multiple": 4}


@pytest.fixture(scope="module")
def state() -> Iterator[TrainState]:
    config = tiny_config(model__num_layers=2)
    parallel.initialize(config.parallel, seed=1)
    yield build_train_state(config)
    parallel.destroy()


@pytest.fixture
def place(state: TrainState, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Where this module believes the rank to be. Megatron goes on with what is true."""
    names = ("context_parallel_world_size", "context_parallel_rank", "tensor_model_parallel_rank")
    place = SimpleNamespace(**{f"get_{name}": getattr(parallel_state, f"get_{name}") for name in names})
    monkeypatch.setattr(microbatches, "parallel_state", place)
    return place


def second_of_two(place: SimpleNamespace) -> None:
    place.get_context_parallel_world_size, place.get_context_parallel_rank = lambda: 2, lambda: 1


def packed_batch() -> Batch:
    return tiny_batch(tiny_config(**PACKED), seed=0)


def test_one_context_parallel_rank_holds_the_batch_itself(place: SimpleNamespace) -> None:
    batch = packed_batch()
    assert context_share(batch) is batch


def test_a_context_parallel_rank_holds_its_chunks_of_a_row(place: SimpleNamespace, state: TrainState) -> None:
    """Of four chunks of 8 positions, the second of two ranks holds the second and the third."""
    second_of_two(place)
    batch = tiny_batch(state.config, seed=0)
    share = context_share(batch)
    assert share.positions.tolist() == list(range(8, 24))
    assert torch.equal(share.ids, batch.ids[:, 8:24]) and torch.equal(share.loss_mask, batch.loss_mask[:, 8:24])
    assert context_share(share) is share


def test_a_context_parallel_rank_holds_its_chunks_of_every_document(place: SimpleNamespace) -> None:
    second_of_two(place)
    batch = packed_batch()
    assert batch.cu_seqlens.tolist() == [0, 8, 16, 32]
    share = context_share(batch)
    assert share.positions.tolist() == [*range(2, 6), *range(10, 14), *range(20, 28)]
    assert torch.equal(share.cu_seqlens, batch.cu_seqlens)
    row = packed_seq_params(share)
    assert (row.context_rank, row.context_size) == (1, 2)


def test_only_packed_rows_have_documents(place: SimpleNamespace, state: TrainState) -> None:
    assert packed_seq_params(tiny_batch(state.config, seed=0)) is None
    row = packed_seq_params(packed_batch())
    assert isinstance(row, PackedRow) and row.boundaries.tolist() == [0, 8, 16, 32]
    assert (row.context_rank, row.context_size) == (0, 1)


def test_what_is_staged_is_the_share_with_its_packed_row_on_the_device(place: SimpleNamespace) -> None:
    second_of_two(place)
    staged = stage(packed_batch(), torch.device("meta"))
    assert staged.ids.shape == (1, 16) and staged.ids.device.type == "meta"
    assert staged.positions.tolist() == context_share(packed_batch()).positions.tolist()
    assert staged.packed_row.cu_seqlens_q.device.type == "meta"
    assert staged.packed_row.boundaries.tolist() == [0, 8, 16, 32]


def test_each_micro_batch_has_a_table(state: TrainState) -> None:
    batches = [tiny_batch(state.config, seed=seed) for seed in (0, 4)]
    tables = run_microbatches(state.wrapped, batches, state.loss_table, forward_only=True)
    names = state.loss_table.names
    assert tables.shape == (2, len(names), 2) and tables.dtype == torch.float64
    for table, batch in zip(tables, batches, strict=True):
        assert table[names.index("loss"), 1] == batch.loss_mask.sum()
        assert table[names.index("tokens")].tolist() == [(~batch.is_padding).sum(), len(batch.ids)]
    together = run_microbatches(state.wrapped, batches[:1], state.loss_table, forward_only=True)
    assert torch.equal(together, tables[:1])


def test_a_staged_batch_gives_the_losses_of_the_batch(state: TrainState) -> None:
    batch = tiny_batch(state.config, seed=0)
    plain, staged = (
        run_microbatches(state.wrapped, [one], state.loss_table, forward_only=True)
        for one in (batch, stage(batch, torch.device("cpu")))
    )
    assert torch.equal(plain, staged)


def test_gradients_are_computed_unless_only_losses_are_wanted(state: TrainState) -> None:
    batches = [tiny_batch(state.config, seed=0)]
    for forward_only in (True, False):
        state.wrapped[0].zero_grad_buffer()
        options = {"forward_only": True} if forward_only else {}
        run_microbatches(state.wrapped, batches, state.loss_table, **options)
        gradients = [parameter.main_grad for parameter in state.model_chunks[0].parameters()]
        assert any(gradient.any() for gradient in gradients) == (not forward_only)


def test_rows_are_counted_by_the_first_context_parallel_rank_alone(place: SimpleNamespace, state: TrainState) -> None:
    batches, names = [tiny_batch(state.config, seed=0)], state.loss_table.names
    first = run_microbatches(state.wrapped, batches, state.loss_table, forward_only=True)
    place.get_context_parallel_rank = lambda: 1
    second = run_microbatches(state.wrapped, batches, state.loss_table, forward_only=True)
    assert second[0, names.index("tokens"), 1] == 0
    second[0, names.index("tokens"), 1] = first[0, names.index("tokens"), 1]
    assert torch.equal(first, second)


def test_losses_are_counted_by_the_first_tensor_parallel_rank_alone(place: SimpleNamespace, state: TrainState) -> None:
    place.get_tensor_model_parallel_rank = lambda: 1
    batches = [tiny_batch(state.config, seed=seed) for seed in (0, 1)]
    tables = run_microbatches(state.wrapped, batches, state.loss_table, forward_only=True)
    assert tables.shape == (2, len(state.loss_table.names), 2)
    assert tables.dtype == torch.float64 and not tables.any()


def test_tables_are_summed_over_micro_batches_and_ranks(state: TrainState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda table: table.mul_(10))
    tables = torch.arange(12, dtype=torch.float64).view(2, 3, 2)
    expected = [[60, 80], [100, 120], [140, 160]]
    assert sum_over_ranks(tables) == expected
    assert sum_over_ranks(tables, torch.ones(1, 2, dtype=torch.float64)) == [*expected, [10, 10]]
    assert tables.sum() == 66  # unchanged
