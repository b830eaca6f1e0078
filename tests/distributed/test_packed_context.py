"""Packed documents under context parallelism: each rank holds a share of every document, and nothing changes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

from megatron_most import parallel, platform
from megatron_most.config import RunConfig
from megatron_most.data.loading.batch import Batch
from megatron_most.training.microbatches import context_share, stage
from megatron_most.training.train_step import build_train_state, compute_gradients
from megatron_most.vocab import NO_CODE
from tests.distributed.harness import run_ranks
from tests.distributed.observe import BatchMaker, Observation, assert_same, observe
from tests.distributed.shards import fill_weights
from tests.distributed.tiny import tiny_batch, tiny_config
from tests.integration.tiny_run import metric_lines, run_config, train
from tests.unit.model.packed_rows import document_kernel

pytestmark = pytest.mark.invariance

LENGTH, MULTIPLE = 64, 8
DOCUMENTS = [[40, 8, 16], [8, 24, 24, 8], [64], [16, 16, 32]]
"""Lengths of the documents of each row of a global batch, their padding included."""

TP, PP = "parallel__tensor_model_parallel_size", "parallel__pipeline_model_parallel_size"
CP, EP = "parallel__context_parallel_size", "parallel__expert_model_parallel_size"
ROWS = {"data__seq_length": LENGTH, "training__micro_batch_size": 1, "data__packing": False}
PACKED = {**ROWS, "data__packing": True, "data__document_multiple": MULTIPLE}
ATTENTION: dict[str, dict[str, Any]] = {
    "mla": {
        "model__attention__q_lora_rank": 20,
        "model__attention__rope__rope_type": "yarn",
        "model__attention__rope__original_max_position_embeddings": 16,
        "model__attention__rope__rotary_scaling_factor": 4,
    },
    "gqa": {
        "model__attention__type": "gqa",
        "model__attention__num_query_groups": 2,
        "model__attention__kv_channels": 12,
        "model__attention__rope__rope_type": "llama3",
        "model__attention__rope__original_max_position_embeddings": 16,
        "model__attention__rope__rotary_scaling_factor": 4,
    },
}
LAYOUTS = {
    "cp2": (2, {CP: 2}),
    "cp4": (4, {CP: 4}),
    "tp2-cp2": (4, {TP: 2, CP: 2}),
}
SLOW_LAYOUTS = {
    "pp2-cp2-recompute": (4, {PP: 2, CP: 2, "training__recompute": "full"}),
    "cp2-ep2-recompute": (2, {CP: 2, EP: 2, "training__recompute": "moe"}),
}
UNSHARDED = {"optimizer__use_distributed_optimizer": False, "optimizer__overlap_grad_reduce": False}


def packed_rows(config: RunConfig, step: int) -> list[Batch]:
    """Rows of several documents, with up to three positions of padding at the end of each."""
    return [documents(tiny_batch(config, seed=10 * step + row), lengths) for row, lengths in enumerate(DOCUMENTS)]


def whole_rows(config: RunConfig, step: int) -> list[Batch]:
    """Rows of one document each."""
    return [documents(tiny_batch(config, seed=10 * step + row), [LENGTH]) for row in range(4)]


def documents(batch: Batch, lengths: list[int]) -> Batch:
    """The batch, packed or not, with its positions taken for documents of these lengths."""
    ends = torch.tensor(lengths).cumsum(0)
    is_padding = torch.zeros_like(batch.is_padding)
    for index, end in enumerate(ends.tolist()):
        is_padding[0, end - index % 4 : end] = True
    loss_mask = batch.loss_mask * ~is_padding
    boundaries = torch.cat([torch.zeros(1, dtype=torch.int32), ends.int()])
    return dataclasses.replace(
        batch,
        is_padding=is_padding,
        loss_mask=loss_mask,
        code_labels=batch.code_labels.masked_fill(loss_mask[..., None] == 0, NO_CODE),
        cu_seqlens=None if batch.cu_seqlens is None else boundaries,
    )


def observe_both(overrides: dict[str, Any], batches_of: BatchMaker) -> list[Observation]:
    """One step with each kind of attention."""
    return [observe(options | overrides, 1, batches_of) for options in ATTENTION.values()]


@functools.cache
def one_process() -> list[Observation]:
    [observations] = run_ranks(1, observe_both, PACKED | UNSHARDED, packed_rows)
    return observations


def assert_all_same(ranks: list[list[Observation]], expected: list[Observation]) -> None:
    for observations, alone in zip(zip(*ranks, strict=True), expected, strict=True):
        assert_same(observations, alone)


def check(world_size: int, overrides: dict[str, Any]) -> None:
    assert_all_same(run_ranks(world_size, observe_both, PACKED | overrides, packed_rows), one_process())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_rows_equal_one_process(layout):
    check(*LAYOUTS[layout])


def test_a_kernel_that_knows_documents_computes_the_shares_of_two_ranks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(platform, "document_attention", lambda head_dim, dtype: document_kernel)
    check(2, {CP: 2})


@pytest.mark.slow
@pytest.mark.parametrize("layout", SLOW_LAYOUTS)
def test_packed_rows_equal_one_process_in_more_layouts(layout):
    check(*SLOW_LAYOUTS[layout])


def test_one_document_in_a_packed_row_equals_the_row():
    [expected] = run_ranks(1, observe_both, ROWS | UNSHARDED, whole_rows)
    assert_all_same(run_ranks(2, observe_both, PACKED | {CP: 2}, whole_rows), expected)


@dataclasses.dataclass
class HeadsUse:
    """Of a step on this rank: rows that went through the text head, and positions and targets that it holds."""

    rows: list[int]
    positions: list[int]
    targets: list[int]
    table: torch.Tensor
    gradients: torch.Tensor


def few_targets(config: RunConfig) -> list[Batch]:
    """Rows whose targets are in the first positions of documents: only the first context-parallel rank holds any."""
    batches = packed_rows(config, 0)
    for batch in batches:
        starts, lengths = batch.cu_seqlens[:-1].long(), batch.cu_seqlens.diff()
        place = torch.arange(LENGTH) - starts.repeat_interleave(lengths)
        batch.loss_mask *= place < MULTIPLE // 4
        batch.code_labels[batch.loss_mask == 0] = NO_CODE
    return [dataclasses.replace(batch) for batch in batches]


def use_of_heads(overrides: dict[str, Any], is_staged: bool, is_everywhere: bool) -> HeadsUse:
    """Gradients of batches that are cut by the loader's thread or by the step; heads at targets or at all positions."""
    config = tiny_config(**overrides)
    parallel.initialize(config.parallel, seed=1)
    state = build_train_state(config, fill_weights)
    rows: list[int] = []
    state.model_chunks[0].output_layer.register_forward_pre_hook(lambda head, args: rows.append(len(args[0])))
    batches = few_targets(config)
    shares = [context_share(batch) for batch in batches]
    targets = Batch.targets
    if is_everywhere:
        ones = torch.ones(1, LENGTH // torch.distributed.get_world_size())
        Batch.targets = lambda batch: targets(dataclasses.replace(batch, loss_mask=ones))
    table = compute_gradients(state, [stage(batch, torch.device("cpu")) for batch in batches] if is_staged else batches)
    gradients = torch.cat([parameter.main_grad.flatten() for parameter in state.model_chunks[0].parameters()])
    return HeadsUse(
        rows,
        [share.ids.shape[1] for share in shares],
        [int(share.loss_mask.sum()) for share in shares],
        table,
        gradients,
    )


def test_heads_run_on_the_targets_that_a_rank_holds():
    overrides = PACKED | UNSHARDED | ATTENTION["mla"] | {CP: 2}
    everywhere = run_ranks(2, use_of_heads, overrides, False, True)
    cut_by_step = run_ranks(2, use_of_heads, overrides, False, False)
    staged = run_ranks(2, use_of_heads, overrides, True, False)
    first, second = staged
    assert first.rows == first.targets and 0 < sum(first.rows) < sum(first.positions) / 2
    assert second.rows == second.targets and not any(second.rows)
    for whole, cut, use in zip(everywhere, cut_by_step, staged, strict=True):
        assert whole.rows == whole.positions and cut.rows == use.rows
        assert torch.equal(use.table, cut.table) and torch.equal(use.gradients, cut.gradients)
        # A product of fewer rows may add in another order.
        torch.testing.assert_close(use.table, whole.table, rtol=1e-6, atol=0)
        unit = whole.gradients.abs().max().item()
        torch.testing.assert_close(use.gradients, whole.gradients, rtol=0, atol=1e-6 * unit)


def test_a_run_on_packed_data_logs_what_one_process_logs(tmp_path):
    """From datasets to training and validation losses, with the documents padded by the loader."""
    packed = ATTENTION["gqa"] | {"data__packing": True, "data__document_multiple": 4}
    lines = []
    for world_size, overrides in ((1, {}), (2, {CP: 2})):
        config = run_config(tmp_path, f"{world_size} ranks", **packed, **overrides)
        run_ranks(world_size, train, config)
        lines.append(metric_lines(config))
    alone, shared = lines
    assert len(alone) == len(shared) > 3
    for expected, line in zip(alone, shared, strict=True):
        assert line == pytest.approx(expected, rel=2e-5)
