"""Weights drawn on many ranks: every shard its own, every copy the same."""

from __future__ import annotations

import itertools

import pytest
import torch
from megatron.core import parallel_state

from megatron_most import parallel
from megatron_most.model import build_model
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import tiny_config

pytestmark = pytest.mark.invariance


def initial_weights(seed: int) -> tuple[int, dict[str, torch.Tensor]]:
    """This rank's pipeline stage, and its weights by local name; two stages by two expert ranks."""
    config = tiny_config(parallel__pipeline_model_parallel_size=2, parallel__expert_model_parallel_size=2)
    parallel.initialize(config.parallel, seed)
    weights = {name: value.detach().clone() for name, value in build_model(config)[0].named_parameters()}
    return parallel_state.get_pipeline_model_parallel_rank(), weights


def test_no_two_experts_begin_equal_and_all_copies_do() -> None:
    ranks = run_ranks(4, initial_weights, 1234)

    experts = {
        (rank, name): value
        for rank, (_, weights) in enumerate(ranks)
        for name, value in weights.items()
        if ".mlp.experts." in name
    }
    # Three MoE layers of eight experts with two matrices each.
    assert len(experts) == 3 * 8 * 2
    for (one, first), (other, second) in itertools.combinations(experts.items(), 2):
        assert first.shape != second.shape or not torch.equal(first, second), f"{one} equals {other}"

    for stage in (0, 1):
        mine, theirs = (weights for at, weights in ranks if at == stage)
        copies = [name for name in mine if ".mlp.experts." not in name]
        assert any("router" in name for name in copies)
        for name in copies:
            assert torch.equal(mine[name], theirs[name]), f"stage {stage}: copies of {name} differ"
    routers = [value for _, weights in ranks[::2] for name, value in weights.items() if "router" in name]
    assert len(routers) == 3
    assert not any(torch.equal(first, second) for first, second in itertools.combinations(routers, 2))
