"""Every parallel layout computes what one process computes: losses, routing and every gradient, in fp32."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from megatron_most import parallel
from megatron_most.model import build_model
from megatron_most.moe import collect_routing
from megatron_most.training.loss import LossTable
from megatron_most.training.optimizer import build_optimizer, wrap_model
from megatron_most.training.step import run_microbatches, sum_over_ranks
from tests.distributed.harness import run_ranks
from tests.distributed.shards import Piece, assemble, fill_weights, local_pieces
from tests.distributed.tiny import tiny_batch, tiny_config

pytestmark = pytest.mark.invariance

NUM_MICROBATCHES = 8
LOSS_TOLERANCE = 1e-6  # relative
GRADIENT_TOLERANCE = 1e-6  # of the largest gradient

TP, PP = "parallel__tensor_model_parallel_size", "parallel__pipeline_model_parallel_size"
EP, ETP = "parallel__expert_model_parallel_size", "parallel__expert_tensor_parallel_size"
CP = "parallel__context_parallel_size"
VPP = "parallel__virtual_pipeline_model_parallel_size"
RECOMPUTE = "training__recompute"
UNSHARDED = {"optimizer__distributed": False, "optimizer__overlap": False}

LAYOUTS = {
    "tp2": (2, {TP: 2}),
    "ep2": (2, {EP: 2}),
    "pp2": (2, {PP: 2}),
    "dp2": (2, {}),
    "pp2-vpp2": (2, {PP: 2, VPP: 2}),
    "cp2": (2, {CP: 2}),
    "ep2-allgather": (2, {EP: 2, "model__moe__dispatcher": "allgather"}),
    "ep4": (4, {EP: 4}),
    "tp2-pp2": (4, {TP: 2, PP: 2}),
    "tp2-ep2-etp1": (4, {TP: 2, EP: 2, ETP: 1}),
    "tp2-ep2-etp2": (4, {TP: 2, EP: 2}),
    "pp2-ep2": (4, {PP: 2, EP: 2}),
    "dp2-ep2": (4, {EP: 2}),
    "cp2-ep2": (4, {CP: 2, EP: 2}),
    "tp2-cp2": (4, {TP: 2, CP: 2}),
    "ep2-recompute-moe": (2, {EP: 2, RECOMPUTE: "moe"}),
    "pp2-recompute-moe": (2, {PP: 2, RECOMPUTE: "moe"}),
    "pp2-recompute-full": (2, {PP: 2, RECOMPUTE: "full"}),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "frame": {},
    "flat": {"vocab__layout": "flat"},
    "packed": {"data__packing": True, "training__micro_batch_size": 1},
    "q-lora": {"model__attention__q_lora_rank": 20},
    "score-all": {"model__moe__score_rule": "all", "model__moe__expert_order": "contiguous"},
}
CASES = [(layout, "frame") for layout in LAYOUTS]
CASES += [(layout, variant) for variant in ("flat", "packed", "score-all") for layout in ("tp2", "ep2", "pp2-vpp2")]
CASES += [("tp2", "q-lora")]


def one_step(overrides: dict[str, Any]) -> tuple[list[list[float]], list[dict], float, list[Piece]]:
    """Metric table, routing, gradient norm and this rank's pieces of every gradient, after one global batch."""
    config = tiny_config(**{**UNSHARDED, **overrides})
    parallel.initialize(config.parallel, seed=1)
    chunks = build_model(config)
    fill_weights(chunks)
    wrapped = wrap_model(config, chunks)
    optimizer = build_optimizer(config, wrapped)
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    dp_rank, dp_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    batches = [tiny_batch(config, seed) for seed in range(NUM_MICROBATCHES) if seed % dp_size == dp_rank]
    loss_table = LossTable(config.vocab, config.model.codebook_weights(config.vocab))
    table = sum_over_ranks(run_microbatches(wrapped, batches, loss_table))
    routing = collect_routing(chunks, config.model)
    optimizer.prepare_grads()
    grad_norm = optimizer.get_grad_norm()
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.copy_(parameter.main_grad)
    return table, routing, grad_norm, [(key, shape, at, view.clone()) for key, shape, at, view in local_pieces(chunks)]


@functools.cache
def one_process(variant: str):
    [(table, routing, grad_norm, pieces)] = run_ranks(1, one_step, VARIANTS[variant])
    return table, routing, grad_norm, assemble([pieces])


@pytest.mark.parametrize("layout, variant", CASES)
def test_layout_equals_one_process(layout, variant):
    world_size, overrides = LAYOUTS[layout]
    ranks = run_ranks(world_size, one_step, {**VARIANTS[variant], **overrides})
    table, routing, grad_norm, gradients = one_process(variant)

    for rank_table, rank_routing, rank_norm, _ in ranks:
        for (loss_sum, count), (expected_sum, expected_count) in zip(rank_table, table, strict=True):
            assert count == expected_count
            assert loss_sum == pytest.approx(expected_sum, rel=LOSS_TOLERANCE)
        assert rank_norm == pytest.approx(grad_norm, rel=1e-5)
        for layer, expected in zip(rank_routing, routing, strict=True):
            assert layer["outside_group"] == 0
            assert layer["balance_loss"] == pytest.approx(expected["balance_loss"], rel=LOSS_TOLERANCE)
            for field in ("layer", "pairs", "tokens"):
                assert layer[field] == expected[field]

    assembled = assemble(pieces for *_, pieces in ranks)
    assert assembled.keys() == gradients.keys()
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, expected in gradients.items():
        difference = (assembled[name] - expected).abs().max() / largest
        assert difference <= GRADIENT_TOLERANCE, f"{name}: gradient differs by {difference:.1e} of the largest"


@pytest.mark.parametrize("variant", ["frame", "q-lora"])
def test_every_weight_has_a_gradient(variant):
    *_, gradients = one_process(variant)
    assert {name for name, gradient in gradients.items() if not gradient.any()} == set()


def copies(chunks: list[torch.nn.Module]) -> list[Piece]:
    return [(key, shape, at, view.detach().clone()) for key, shape, at, view in local_pieces(chunks)]


def one_update(overrides: dict[str, Any]) -> tuple[float, list[Piece], list[Piece]]:
    """Gradient norm, and this rank's pieces of every weight before and after one update of the default optimizer."""
    # AdamW's first step is lr * g / (|g| + eps): this eps keeps rounding of tiny gradients from becoming whole steps.
    config = tiny_config(optimizer__lr=1e-2, optimizer__eps=1e-3, **overrides)
    parallel.initialize(config.parallel, seed=1)
    chunks = build_model(config)
    fill_weights(chunks)
    before = copies(chunks)
    wrapped = wrap_model(config, chunks)
    optimizer = build_optimizer(config, wrapped)
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    dp_rank, dp_size = parallel.data_parallel_place()
    batches = [tiny_batch(config, seed) for seed in range(NUM_MICROBATCHES) if seed % dp_size == dp_rank]
    run_microbatches(wrapped, batches, LossTable(config.vocab, config.model.codebook_weights(config.vocab)))
    _, grad_norm, _ = optimizer.step()
    return grad_norm, before, copies(chunks)


@functools.cache
def one_process_update() -> tuple[float, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gradient norm, and weights before and after the update, without a distributed optimizer."""
    [(grad_norm, before, after)] = run_ranks(1, one_update, UNSHARDED)
    return grad_norm, assemble([before]), assemble([after])


@pytest.mark.parametrize("layout", ["dp2", "tp2", "dp2-ep2", "pp2-vpp2"])
def test_distributed_optimizer_updates_as_one_process_does(layout):
    world_size, overrides = LAYOUTS[layout]
    ranks = run_ranks(world_size, one_update, overrides)
    expected_norm, before, expected = one_process_update()
    for grad_norm, *_ in ranks:
        assert grad_norm == pytest.approx(expected_norm, rel=1e-5)
    updated = assemble(pieces for *_, pieces in ranks)
    assert updated.keys() == expected.keys()
    for name, weight in expected.items():
        assert not torch.equal(weight, before[name]), name
        difference = (updated[name] - weight).abs().max()
        assert difference <= 1e-6, f"{name}: differs by {difference:.1e} after an update"
