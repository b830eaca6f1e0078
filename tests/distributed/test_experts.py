"""Every expert backend, order and dispatcher computes what one expert after another computes on one rank."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from megatron_most import parallel
from megatron_most.training.microbatches import sum_over_ranks
from megatron_most.training.train_step import build_train_state, compute_gradients
from tests.distributed.harness import run_ranks
from tests.distributed.observe import own_share
from tests.distributed.shards import Piece, assemble, fill_weights, local_pieces
from tests.distributed.tiny import tiny_batch, tiny_config

pytestmark = pytest.mark.invariance

TP, EP = "parallel__tensor_model_parallel_size", "parallel__expert_model_parallel_size"
ETP = "parallel__expert_tensor_parallel_size"
BACKEND, ORDER = "model__moe__expert_backend", "model__moe__expert_order"
DISPATCHER, OVERLAP = "model__moe__moe_token_dispatcher_type", "model__moe__moe_shared_expert_overlap"
RECOMPUTE = "training__recompute"

# Unequal groups, unequal top-k and common experts: pools of 3, 3 and 2, lists that interleave them.
EXPERTS = {
    "model__moe__groups": "[{modality: text, experts: [5, 0, 3], moe_router_topk: 3},"
    " {modality: audio, experts: [7, 2, 4], moe_router_topk: 1}]",
    "model__moe__common__experts": "[1, 6]",
    "training__global_batch_size": 4,
}
SEQUENTIAL = {BACKEND: "sequential"}
CASES = {
    "grouped": (1, {}),
    "grouped overlapped": (1, {OVERLAP: True}),
    "ep2": (2, {EP: 2}),
    "ep2 contiguous": (2, {EP: 2, ORDER: "contiguous"}),
    "ep2 sequential": (2, {EP: 2, **SEQUENTIAL}),
    "ep2 sequential contiguous": (2, {EP: 2, ORDER: "contiguous", **SEQUENTIAL}),
    "ep2 allgather": (2, {EP: 2, DISPATCHER: "allgather"}),
    "ep2 overlapped": (2, {EP: 2, OVERLAP: True}),
    "ep2 overlapped recompute": (2, {EP: 2, OVERLAP: True, RECOMPUTE: "moe"}),
    "ep2 recompute full": (2, {EP: 2, OVERLAP: True, RECOMPUTE: "full"}),
    "tp2 etp2": (2, {TP: 2}),
    "tp2 etp1": (2, {TP: 2, ETP: 1}),
    "tp2 etp2 sequential": (2, {TP: 2, **SEQUENTIAL}),
    "tp2 etp2 allgather": (2, {TP: 2, DISPATCHER: "allgather"}),
    "tp2 overlapped": (2, {TP: 2, OVERLAP: True}),
    "tp2 ep2": (2, {TP: 2, EP: 2, ETP: 1, OVERLAP: True}),
}


def one_pass(overrides: dict[str, Any]) -> tuple[list[list[float]], list[Piece]]:
    """Metric table and this rank's pieces of every gradient after four micro-batches."""
    config = tiny_config(
        **{
            "optimizer__use_distributed_optimizer": False,
            "optimizer__overlap_grad_reduce": False,
            **EXPERTS,
            **overrides,
        }
    )
    parallel.initialize(config.parallel, seed=1)
    state = build_train_state(config, fill_weights)
    table = sum_over_ranks(compute_gradients(state, own_share([tiny_batch(config, seed) for seed in range(4)])))
    chunks = state.model_chunks
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.copy_(parameter.main_grad)
    return table, [(key, shape, at, view.clone()) for key, shape, at, view in local_pieces(chunks)]


@functools.cache
def one_after_another() -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    [(table, pieces)] = run_ranks(1, one_pass, SEQUENTIAL)
    return table, assemble([pieces])


@pytest.mark.parametrize("case", CASES)
def test_equal_to_one_expert_after_another(case: str) -> None:
    world_size, overrides = CASES[case]
    ranks = run_ranks(world_size, one_pass, overrides)
    table, gradients = one_after_another()
    for rank_table, _ in ranks:
        for (loss_sum, count), (expected_sum, expected_count) in zip(rank_table, table, strict=True):
            assert count == expected_count
            assert loss_sum == pytest.approx(expected_sum, rel=1e-6)
    assembled = assemble(pieces for _, pieces in ranks)
    assert assembled.keys() == gradients.keys()
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, expected in gradients.items():
        difference = (assembled[name] - expected).abs().max() / largest
        assert difference <= 1e-6, f"{name}: gradient differs by {difference:.1e} of the largest"
