"""Which implementation routes: all ranks agree, the choice leaves no trace, and training is the same with either."""

from __future__ import annotations

import time
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_most import parallel, platform
from megatron_most.errors import ConfigError
from megatron_most.moe import ModalityAwareRouter
from megatron_most.moe.routing_kernel import RoutingKernel
from megatron_most.platform import trial
from megatron_most.training.train_step import build_train_state, train_step
from tests.distributed.harness import run_ranks
from tests.distributed.observe import STEADY, assert_same, mixed_batches, observe, own_share
from tests.distributed.tiny import tiny_config

FUSION, TP, CP = (
    "model__moe__moe_router_fusion",
    "parallel__tensor_model_parallel_size",
    "parallel__context_parallel_size",
)
UNSHARDED = {"optimizer__use_distributed_optimizer": False, "optimizer__overlap_grad_reduce": False}


def seconds_of_each_rank() -> list[float]:
    """Rank 0 is slow with the first call, rank 1 with the second."""
    parallel.initialize(tiny_config().parallel, seed=1)
    pauses = (0.02, 0.001) if torch.distributed.get_rank() == 0 else (0.001, 0.01)
    return platform.compare_seconds(*(lambda pause=pause: time.sleep(pause) for pause in pauses), None)


def test_ranks_agree_on_the_time_of_the_slowest():
    first, second = run_ranks(2, seconds_of_each_rank)
    assert first == second
    assert 0.02 <= first[0] < 0.1 and 0.01 <= first[1] < 0.1 and first[2] == 0


def trained(overrides: dict[str, Any], seconds: tuple[float, float]) -> tuple[list[bool], list[list[float]]]:
    """Which routers use the kernel if the trial takes so long, and the sums of the first step by operators."""
    config = tiny_config(**STEADY, **overrides)
    parallel.initialize(config.parallel, seed=1)
    whole = platform.compare_seconds

    def compare(*calls: Any) -> list[float]:
        assert whole(*calls)[1] > 0
        return list(seconds)

    with mock.patch.object(platform, "compare_seconds", compare):
        state = build_train_state(config)
    routers = [module for module in state.model_chunks[0].modules() if isinstance(module, ModalityAwareRouter)]
    uses_kernel = [isinstance(router._kernel, RoutingKernel) for router in routers]
    for router in routers:
        router.use_kernel(False)
    return uses_kernel, train_step(state, own_share(mixed_batches(config, 0))).sums


def test_the_kernel_is_taken_only_where_it_is_faster(capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """A trial changes neither random numbers nor weights, statistics or the scale of losses."""
    monkeypatch.setattr(trial, "_CALLS", 1)  # Triton's interpreter is slow
    monkeypatch.setattr(trial, "_ROUNDS", 1)
    biased = {"model__moe__moe_router_load_balancing_type": "global_aux_loss"}
    [(none, expected)] = run_ranks(1, trained, biased | UNSHARDED, (1.0, 1.0))
    assert not any(none) and "router:" not in capfd.readouterr().out
    for seconds, is_taken in (((1.0, 0.5), True), ((1.0, 0.95), False)):
        overrides = {**biased, **UNSHARDED, FUSION: "null"}
        [(uses_kernel, sums)] = run_ranks(1, trained, overrides, seconds)
        assert uses_kernel == [is_taken] * 3 and sums == expected
        printed = capfd.readouterr().out
        assert "router: 64 tokens, forward and backward: 1000.000 ms with torch's operators" in printed
        assert printed.count("router:") == 1 and ("the kernel used" in printed) == is_taken


def test_without_triton_operators_route(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(platform, "can_run_triton", lambda: False)
    [(uses_kernel, _)] = run_ranks(1, trained, {**UNSHARDED, FUSION: "null"}, (1.0, 0.5))
    assert not any(uses_kernel)


def test_a_kernel_that_does_not_run_on_a_rank_is_taken_by_none(
    capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    def fails_on_rank_one(self: RoutingKernel, *arguments: Any) -> Any:
        if torch.distributed.get_rank() == 1:
            raise RuntimeError("Failed to find C compiler")
        return route(self, *arguments)

    route = RoutingKernel.__call__
    monkeypatch.setattr(RoutingKernel, "__call__", fails_on_rank_one)
    for uses_kernel, _ in run_ranks(2, trained, {FUSION: "null"}, (1.0, 0.5)):
        assert not any(uses_kernel)
    assert (
        "router: torch's operators used, because the Triton kernel does not run on every rank" in capfd.readouterr().out
    )


def test_group_limited_routing_has_no_kernel():
    groups = "[{modality: text, size: 4, moe_router_topk: 2, moe_router_num_groups: 2, moe_router_group_topk: 1}]"
    with pytest.raises(ConfigError, match="model.moe.moe_router_fusion=True: needs moe_router_num_groups=1"):
        tiny_config(model__moe__groups=groups, **{FUSION: True})


@pytest.mark.parametrize(
    "world_size, overrides",
    [(2, {TP: 2, "training__recompute": "full"}), (2, {CP: 2, "training__micro_batch_size": 1})],
    ids=["tp2-recompute", "cp2"],
)
def test_training_is_the_same(world_size: int, overrides: dict[str, Any]):
    """Losses of rows that are spread over ranks, and layers that run twice."""
    micro = {key: value for key, value in overrides.items() if "micro" in key}
    [expected] = run_ranks(1, observe, UNSHARDED | micro, 1)
    assert_same(run_ranks(world_size, observe, {**overrides, FUSION: True}, 1), expected)
