"""Routing statistics: against a loop over tokens, over several ranks, and which passes count."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_most import parallel
from megatron_most.config import ParallelConfig
from megatron_most.moe import ExpertGroups, collect_routing
from megatron_most.moe.routing_statistics import _KEPT, LOSSES
from tests.distributed.harness import run_ranks
from tests.unit.moe.counted_tokens import MODEL, MOE, Router, by_hand, count, random_tokens

pytestmark = pytest.mark.invariance


def collected(expert_parallel_size: int) -> tuple[list[dict], list[dict]]:
    """What two layers' routers report after five micro-batches on each rank, and what they report next."""
    parallel.initialize(ParallelConfig(expert_model_parallel_size=expert_parallel_size), seed=1)
    groups = ExpertGroups.from_config(MOE, expert_parallel_size)
    routers = [Router(groups, number) for number in (2, 3)]
    first = 5 * torch.distributed.get_rank()
    for seed in range(first, first + 5):
        for router in routers:
            count(router, random_tokens(groups, seed))
            router.statistics.add_loss("z_loss", torch.tensor([0.5, 0.25, 0.25]) * router.layer_number)
    return collect_routing(routers, MODEL), collect_routing(routers, MODEL)


@pytest.mark.parametrize("expert_parallel_size", [1, 2])
def test_sums_of_all_ranks_equal_a_loop_over_tokens(expert_parallel_size):
    ranks = run_ranks(2, collected, expert_parallel_size)
    assert ranks[0] == ranks[1]
    layers, after = ranks[0]
    assert after == []
    expected = by_hand(ExpertGroups.from_config(MOE), range(10))
    assert [layer["layer"] for layer in layers] == [2, 3]
    for layer in layers:
        assert layer["pairs"] == expected["pairs"] and layer["tokens"] == expected["tokens"]
        assert layer["entropy"] == pytest.approx(expected["entropy"], rel=1e-6)
        for name, scores in layer["scores"].items():
            assert scores == pytest.approx(expected["scores"][name], rel=1e-6)
        assert layer["outside_group"] == 0
        assert {name: layer[name] for name in LOSSES} == {
            "balance_loss": 0,
            "z_loss": 10 * layer["layer"],
            "orthogonality_loss": 0,
        }


def test_rank_imbalance_is_the_mean_over_micro_batches_of_all_tokens_that_are_exchanged():
    layer = run_ranks(2, collected, 2)[0][0][0]
    groups = ExpertGroups.from_config(MOE, 2)
    ratios = []
    for seed in range(5):
        maps = [random_tokens(groups, seed + 5 * rank)["routing_map"] for rank in range(2)]
        per_rank = torch.cat(maps).sum(dim=0).view(2, -1).sum(dim=1).float()
        ratios.append((per_rank.max() / per_rank.mean()).item())
    total, count = layer["rank_imbalance"]
    assert total / count == pytest.approx(sum(ratios) / 5, rel=1e-6)
    assert run_ranks(2, collected, 1)[0][0][0]["rank_imbalance"] == [0, 0]


def imbalance_of_many() -> tuple[float, float]:
    parallel.initialize(ParallelConfig(expert_model_parallel_size=2), seed=1)
    groups = ExpertGroups.from_config(MOE, 2)
    router = Router(groups, 2)
    batch = random_tokens(groups, 0)
    for index in range(_KEPT + 30):
        is_valid = batch["is_valid"] & (index < _KEPT)
        count(router, {**batch, "is_valid": is_valid})
    return collect_routing([router], MODEL)[0]["rank_imbalance"]


def test_imbalance_keeps_the_latest_micro_batches_and_skips_empty_ones():
    total, count = run_ranks(2, imbalance_of_many)[0]
    assert count == 2 * (_KEPT - 30)
    assert 1 <= total / count <= 2


def imbalance_of_the_second_line() -> tuple[float, float]:
    parallel.initialize(ParallelConfig(expert_model_parallel_size=2), seed=1)
    groups = ExpertGroups.from_config(MOE, 2)
    router = Router(groups, 2)
    for seed in range(3):
        count(router, random_tokens(groups, seed))
    collect_routing([router], MODEL)
    count(router, random_tokens(groups, 3))
    return collect_routing([router], MODEL)[0]["rank_imbalance"]


def test_imbalance_forgets_the_micro_batches_of_the_line_before():
    assert run_ranks(2, imbalance_of_the_second_line)[0][1] == 2  # one for each rank


def one_batch(**changes: Callable) -> dict:
    """A layer's sums after one micro-batch, some of whose tensors are made by ``changes``."""
    parallel.initialize(ParallelConfig(), seed=1)
    groups = ExpertGroups.from_config(MOE)
    router = Router(groups, 2)
    batch = random_tokens(groups, 0)
    count(router, batch | {name: change(groups, batch) for name, change in changes.items()})
    return collect_routing([router], MODEL)[0]


def leak(groups: ExpertGroups, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return ~groups.allowed()[batch["modality"]]


def scores_inside(groups: ExpertGroups, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return batch["group_probs"]


def one_layer_with_leaks() -> dict:
    return one_batch(routing_map=leak)


def one_layer_with_scores_inside() -> dict:
    return one_batch(scores=scores_inside)


def test_pairs_that_leave_the_choice_are_counted():
    [layer] = run_ranks(1, one_layer_with_leaks)
    # 8 experts: text may choose 6 of them, audio 2, image 2.
    outside = {"text": 2, "audio": 6, "image": 6}
    assert layer["outside_group"] == sum(outside[name] * tokens for name, tokens in layer["tokens"].items()) > 0


def test_scores_inside_the_choice_leave_exactly_nothing_outside():
    [layer] = run_ranks(1, one_layer_with_scores_inside)
    choices = ExpertGroups.from_config(MOE).choices
    for (_, scores), choice in zip(layer["scores"].items(), choices, strict=True):
        assert {score for expert, score in enumerate(scores) if expert not in choice} == {0.0}
