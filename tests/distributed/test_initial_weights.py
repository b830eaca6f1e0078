"""Weights drawn on many ranks: every shard its own, every copy the same."""

from __future__ import annotations

import itertools

import pytest
import torch
from megatron.core import parallel_state

from megatron_most import parallel
from megatron_most.model import build_model
from tests.distributed.harness import run_ranks
from tests.distributed.shards import local_pieces
from tests.distributed.tiny import tiny_config

pytestmark = pytest.mark.invariance


Name = tuple[str, tuple[int, ...]]


def initial_weights(backend: str, seed: int) -> tuple[int, dict[Name, torch.Tensor]]:
    """This rank's pipeline stage, and its weights by global name and place; two stages by two expert ranks."""
    config = tiny_config(
        parallel__pipeline_model_parallel_size=2,
        parallel__expert_model_parallel_size=2,
        model__moe__expert_backend=backend,
    )
    parallel.initialize(config.parallel, seed)
    weights = {(key, at): piece.detach().clone() for key, _, at, piece in local_pieces(build_model(config))}
    return parallel_state.get_pipeline_model_parallel_rank(), weights


@pytest.mark.parametrize("backend", ["grouped", "sequential"])
def test_no_two_experts_begin_equal_and_all_copies_do(backend: str) -> None:
    ranks = run_ranks(4, initial_weights, backend, 1234)

    experts = {
        (rank, name): value
        for rank, (_, weights) in enumerate(ranks)
        for name, value in weights.items()
        if ".mlp.experts." in name[0]
    }
    # Three MoE layers of eight experts with three matrices each: gate, up, down.
    assert len(experts) == 3 * 8 * 3
    for (one, first), (other, second) in itertools.combinations(experts.items(), 2):
        assert first.shape != second.shape or not torch.equal(first, second), f"{one} equals {other}"

    for stage in (0, 1):
        mine, theirs = (weights for at, weights in ranks if at == stage)
        copies = [name for name in mine if ".mlp.experts." not in name[0]]
        assert any("router" in name for name, _ in copies)
        for name in copies:
            assert torch.equal(mine[name], theirs[name]), f"stage {stage}: copies of {name} differ"
    routers = [value for _, weights in ranks[::2] for (name, _), value in weights.items() if "router" in name]
    assert len(routers) == 3
    assert not any(torch.equal(first, second) for first, second in itertools.combinations(routers, 2))
