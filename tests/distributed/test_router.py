"""What routers know of other ranks: the load that moves expert biases, and the shares of the global balance loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_most import parallel
from megatron_most.checkpointing.state import load_model_state, plan_state
from megatron_most.config import RunConfig
from megatron_most.data.loading.batch import Batch
from megatron_most.model import build_model
from megatron_most.training.optimizer import build_optimizer, wrap_model
from tests.distributed.harness import run_ranks
from tests.distributed.observe import Observation, assert_same, observe, observe_each, stack
from tests.distributed.shards import assemble
from tests.distributed.tiny import tiny_batch, tiny_config

pytestmark = pytest.mark.invariance

TP, CP = "parallel__tensor_model_parallel_size", "parallel__context_parallel_size"
EP, PP = "parallel__expert_model_parallel_size", "parallel__pipeline_model_parallel_size"
MICRO, RECOMPUTE = "training__micro_batch_size", "training__recompute"
BALANCE = "model__moe__moe_router_load_balancing_type"
RATE = 1e-2
BIASED = {"model__moe__moe_router_bias_update_rate": RATE, "model__moe__moe_router_score_function": "sigmoid"}
LAYOUTS: list[dict[str, Any]] = [
    {MICRO: 1},
    {TP: 2},
    {CP: 2},
    {EP: 2, MICRO: 1},
    {PP: 2, MICRO: 1},
    {PP: 2, MICRO: 1, RECOMPUTE: "full"},
    {EP: 2, MICRO: 1, RECOMPUTE: "moe"},
]


def biases(observations: list[Observation]) -> dict[str, torch.Tensor]:
    """After the last step."""
    weights = assemble(observation.weights[max(observation.weights)] for observation in observations)
    return {name: value for name, value in weights.items() if name.endswith("expert_bias.values")}


def test_expert_biases_move_alike_in_every_layout():
    [[first, second]] = run_ranks(1, after_one_and_two_steps, BIASED)
    start, expected = biases([first]), biases([second])
    assert len(expected) == 3  # MoE layers
    for name, value in expected.items():
        moved = (value - start[name]).abs()
        assert moved.max() == pytest.approx(RATE, rel=1e-4)
        assert not moved[0, 4:].any() and not moved[1, :4].any()  # outside the modality's choice
    ranks = run_ranks(2, observe_each, [(BIASED | layout, 2) for layout in LAYOUTS])
    for layout, observations in zip(LAYOUTS, zip(*ranks, strict=True), strict=True):
        for name, value in biases(list(observations)).items():
            assert torch.equal(value, expected[name]), f"{layout}: {name}"


def after_one_and_two_steps(overrides: dict[str, Any]) -> list[Observation]:
    return [observe(overrides, 1), observe(overrides, 2)]


def two_rows(config: RunConfig, step: int) -> list[Batch]:
    """One micro-batch for each data-parallel rank of a world of 2, or one of two rows."""
    rows = [tiny_batch(config, seed=10 * step + row, rows=1) for row in range(2)]
    return rows if config.training.micro_batch_size == 1 else [stack(rows)]


def test_global_aux_loss_of_one_micro_batch_per_rank_is_the_aux_loss_of_them_all():
    [expected] = run_ranks(1, observe, {BALANCE: "aux_loss", MICRO: 2}, 2, two_rows)
    runs = [{BALANCE: "global_aux_loss", MICRO: 1}, {BALANCE: "global_aux_loss", MICRO: 1, EP: 2}]
    ranks = run_ranks(2, observe_each, [(run, 2) for run in runs], two_rows)
    for observations in zip(*ranks, strict=True):
        assert_same(observations, expected)
    [alone] = run_ranks(1, observe, {BALANCE: "aux_loss", MICRO: 1}, 1, lambda *args: two_rows(*args)[:1])
    assert alone.routing[0]["balance_loss"] != pytest.approx(expected.routing[0]["balance_loss"], rel=1e-2)


def test_global_aux_loss_accumulates_alike_in_every_layout():
    """Two micro-batches of two rows in a step: on two data-parallel ranks, each of them has one row of both."""
    overrides = {BALANCE: "global_aux_loss", MICRO: 2}
    [expected] = run_ranks(1, observe, overrides, 2)
    layouts = [{MICRO: 1}, {TP: 2}, {CP: 2}, {PP: 2}, {PP: 2, RECOMPUTE: "full"}]
    ranks = run_ranks(2, observe_each, [(overrides | layout, 2) for layout in layouts])
    for observations in zip(*ranks, strict=True):
        assert_same(observations, expected)


def save_and_load(directory: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Biases of a bf16 model, and those of a fresh one that loaded its checkpoint."""
    config = tiny_config(**BIASED, precision__dtype="bf16")
    parallel.initialize(config.parallel, seed=1)
    saved, loaded = build_model(config), build_model(config)
    for seed, router in enumerate(routers(saved)):
        router.expert_bias.values.normal_(generator=torch.Generator().manual_seed(seed))
    optimizer = build_optimizer(config, wrap_model(config, saved))
    directory.mkdir()
    share = plan_state(directory, saved, optimizer, copy=False)
    share.write_index([share.write().results])
    load_model_state(directory, loaded)
    return tuple(torch.stack([router.expert_bias.values for router in routers(chunks)]) for chunks in (saved, loaded))


def routers(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    return [module for chunk in chunks for module in chunk.modules() if hasattr(module, "expert_bias")]


def test_checkpoints_hold_the_biases_in_fp32(tmp_path):
    [(saved, loaded)] = run_ranks(1, save_and_load, tmp_path / "checkpoint")
    assert loaded.dtype == torch.float32 and saved.std() > 0.5
    assert torch.equal(saved, loaded) and not torch.equal(saved, saved.bfloat16().float())
