"""One down-projection for queries, keys and values computes what two compute, and their checkpoints are the same."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from megatron_most.model.specs import FusedMultiLatentAttention
from tests.distributed.harness import run_ranks
from tests.distributed.observe import Observation, assert_close, assert_same, observe
from tests.distributed.shards import fill_weights
from tests.distributed.test_resharding import Run

TP, PP = "parallel__tensor_model_parallel_size", "parallel__pipeline_model_parallel_size"
EP, CP = "parallel__expert_model_parallel_size", "parallel__context_parallel_size"
UNSHARDED = {"optimizer__use_distributed_optimizer": False, "optimizer__overlap_grad_reduce": False}
FUSION, RANK = "model__attention__mla_down_proj_fusion", "model__attention__q_lora_rank"
TWO: dict[str, Any] = {RANK: 20}
ONE: dict[str, Any] = {RANK: 20, FUSION: True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {TP: 2}),
    "pp2": (2, {PP: 2, "training__recompute": "full"}),
    "cp2": (2, {CP: 2}),
    "tp2-unsharded": (2, {TP: 2, **UNSHARDED}),
}


@functools.cache
def two_projections() -> Observation:
    [observation] = run_ranks(1, observe, TWO)
    return observation


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_projection_computes_what_two_do(layout: str) -> None:
    world_size, overrides = LAYOUTS[layout]
    assert_same(run_ranks(world_size, observe, {**ONE, **overrides}), two_projections())


def pass_on(overrides: dict[str, Any], source: Path | None, copy: Path) -> list[list[list[float]]]:
    run = Run(overrides, load_weights=fill_weights) if source is None else Run(overrides, 2)
    [attention, *_] = [layer.self_attention for layer in run.state.model_chunks[0].decoder.layers]
    assert isinstance(attention, FusedMultiLatentAttention) == overrides.get(FUSION, False)
    if source is None:
        run.losses(2)
    else:
        run.load(source)
    run.save(copy)
    return run.losses(3)


def test_checkpoints_go_on_with_either(tmp_path: Path) -> None:
    [expected] = run_ranks(1, pass_on, TWO, None, tmp_path / "two")
    source = tmp_path / "two"
    for name, world_size, overrides in (
        ("fused", 1, ONE),
        ("fused-tp2", 2, {**ONE, TP: 2}),
        ("two-ep2", 2, {**TWO, EP: 2}),
        ("fused-unsharded", 1, {**ONE, **UNSHARDED}),
        ("two-again", 1, TWO),
    ):
        for losses in run_ranks(world_size, pass_on, overrides, source, tmp_path / name):
            assert_close(losses, expected, 1e-6, f"{name}, from {source.name}")
        source = tmp_path / name
