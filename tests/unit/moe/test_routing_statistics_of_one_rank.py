"""Routing statistics in this process, which is the only rank: every sum, and what a line forgets of the one before.

``test_routing_statistics.py`` compares several ranks. A mutation tool sees only what runs here.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from megatron.core import parallel_state

from megatron_most import parallel
from megatron_most.config import ParallelConfig
from megatron_most.moe import ExpertGroups, collect_routing
from megatron_most.moe.routing_statistics import _KEPT, LOSSES, RoutingStatistics, _rank_imbalance
from tests.unit.moe.counted_tokens import MODEL, MOE, Router, by_hand, count, random_tokens

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def process_groups() -> Iterator[None]:
    parallel.initialize(ParallelConfig(), seed=1)
    yield
    parallel.destroy()


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> ExpertGroups:
    """Experts in the order of two expert-parallel ranks, of which this process is one."""
    monkeypatch.setattr(parallel_state, "get_expert_model_parallel_world_size", lambda: 2)
    groups = ExpertGroups.from_config(MOE, 2)
    assert groups.physical_to_logical != tuple(range(groups.num_experts))
    return groups


def counted(pairs: list[list[list[float]]]) -> torch.Tensor:
    """``[B, M, 3 * E + 1]`` of ``pairs [B, M, E]``; scores are their doubles, p log p their negatives, tokens 1."""
    first = torch.tensor(pairs)
    return torch.cat([first, 2 * first, -first, torch.ones(*first.shape[:2], 1)], dim=2)


def test_a_line_sums_pairs_scores_entropy_tokens_and_losses(groups: ExpertGroups) -> None:
    routers = [Router(groups, 3), Router(groups, 1)]
    for router in routers:
        for seed in range(3 * router.layer_number, 3 * router.layer_number + 3):
            count(router, random_tokens(groups, seed))
        for power, name in enumerate(LOSSES):
            for _ in range(2):
                router.statistics.add_loss(name, torch.tensor([0.5, 0.25, 0.75]) * 10**power * router.layer_number)
    # A part without routers, and a module whose statistics are something else.
    other = torch.nn.Linear(2, 2)
    other.statistics = {"mean": 1.0}
    layers = collect_routing([other, torch.nn.ModuleList([other, routers[0]]), routers[1]], MODEL)
    assert [layer["layer"] for layer in layers] == [1, 3]
    for layer in layers:
        expected = by_hand(groups, range(3 * layer["layer"], 3 * layer["layer"] + 3))
        assert layer["pairs"] == expected["pairs"] and layer["tokens"] == expected["tokens"]
        assert layer["entropy"] == pytest.approx(expected["entropy"], rel=1e-6)
        for name, scores in layer["scores"].items():
            assert scores == pytest.approx(expected["scores"][name], rel=1e-6)
        assert [layer[name] for name in LOSSES] == [3 * 10**power * layer["layer"] for power in range(3)]
        assert layer["outside_group"] == 0
        assert [type(value) for value in layer["pairs"]["text"] + [layer["tokens"]["text"]]] == [int] * 9
        total, micro_batches = layer["rank_imbalance"]
        assert micro_batches == 3 and 3 <= total < 6


def test_a_line_begins_with_nothing(groups: ExpertGroups) -> None:
    router = Router(groups, 2)
    for seed in range(3):
        count(router, random_tokens(groups, seed))
        router.statistics.add_loss("z_loss", torch.ones(3))
    collect_routing([router], MODEL)
    assert collect_routing([router], MODEL) == []
    count(router, random_tokens(groups, 3))
    [layer] = collect_routing([router], MODEL)
    assert layer["pairs"] == by_hand(groups, range(3, 4))["pairs"] and layer["z_loss"] == 0
    assert layer["rank_imbalance"][1] == 1


def test_a_stage_without_routers_still_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other pipeline stages wait for it in the reduction."""
    reduced = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda table, group=None: reduced.append(table.shape))
    assert collect_routing([torch.nn.Linear(2, 2)], MODEL) == []
    [(rows, _)] = reduced
    assert rows == MODEL.num_layers


def test_one_expert_parallel_rank_has_no_imbalance() -> None:
    groups = ExpertGroups.from_config(MOE)
    router = Router(groups, 2)
    count(router, random_tokens(groups, 0))
    [layer] = collect_routing([router], MODEL)
    assert layer["rank_imbalance"] == [0, 0]


def test_pairs_outside_of_the_choice_are_counted(groups: ExpertGroups) -> None:
    router = Router(groups, 2)
    batch = random_tokens(groups, 0)
    count(router, {**batch, "routing_map": ~groups.allowed()[batch["modality"]]})
    [layer] = collect_routing([router], MODEL)
    # 8 experts: text may choose 6 of them, audio 2, image 2.
    outside = {"text": 2, "audio": 6, "image": 6}
    assert layer["outside_group"] == sum(outside[name] * tokens for name, tokens in layer["tokens"].items()) > 0
    assert isinstance(layer["outside_group"], int)


@pytest.mark.parametrize("num_sequences", [1, 2, 4])
def test_a_count_returns_the_pairs_of_each_sequence(groups: ExpertGroups, num_sequences: int) -> None:
    batch = random_tokens(groups, 0)
    statistics = RoutingStatistics(groups, CPU)
    membership = ((batch["modality"] == torch.arange(3)[:, None]) & batch["is_valid"]).float()
    more = () if num_sequences == 1 else (num_sequences,)  # 1 is the default
    pairs = statistics.count(
        batch["routing_map"], batch["scores"].requires_grad_(), batch["group_probs"], membership, *more
    )
    assert pairs.shape == (num_sequences, 3, groups.num_experts) and not pairs.requires_grad
    for sequence in range(num_sequences):
        of_sequence = torch.arange(len(batch["modality"])) % num_sequences == sequence
        for modality in range(3):
            mine = of_sequence & (batch["modality"] == modality) & batch["is_valid"]
            assert torch.equal(pairs[sequence, modality], batch["routing_map"][mine].sum(dim=0).float())
    assert torch.equal(statistics.routed, pairs.sum(dim=0).double())


def test_sums_are_added_by_column() -> None:
    groups = ExpertGroups.from_config(MOE)
    statistics = RoutingStatistics(groups, CPU)
    first = torch.arange(24.0).view(1, 3, 8)
    assert torch.equal(statistics.add(counted(first.tolist())), first)
    rows = torch.stack([first[0] * 10, first[0] * 100])
    assert torch.equal(statistics.add(counted(rows.tolist())), rows)
    expected = first[0].double() * 111
    assert torch.equal(statistics.routed, expected) and torch.equal(statistics.scores, 2 * expected)
    pairs, scores, p_log_p, tokens, losses = RoutingStatistics.columns(statistics.sums, 8)
    assert torch.equal(pairs, expected) and torch.equal(scores, 2 * expected) and torch.equal(p_log_p, -expected)
    assert tokens.tolist() == statistics.tokens.tolist() == [3, 3, 3]
    assert losses.shape == (3, len(LOSSES)) and not losses.any()


def test_sums_are_exact_beyond_the_integers_of_fp32() -> None:
    groups = ExpertGroups.from_config(MOE)
    statistics = RoutingStatistics(groups, CPU)
    for pairs in (2.0**24, 1.0):
        statistics.add(counted([[[pairs] * 8] * 3]))
    assert statistics.routed.unique().tolist() == [2**24 + 1]


def test_pairs_of_each_rank_are_kept_by_micro_batch() -> None:
    """A rank has four consecutive experts of the physical order. Sequences and modalities are added."""
    statistics = RoutingStatistics(ExpertGroups.from_config(MOE, 2), CPU)
    assert statistics.rank_pairs().shape == (0, 2)
    statistics.add(counted([[[1.0] * 4 + [2.0] * 4] * 3]))
    statistics.add(counted([[[0.0] * 4 + [1.0] * 4] * 3] * 2))
    assert statistics.rank_pairs().tolist() == [[12, 24], [0, 24]]
    statistics.reset()
    assert statistics.rank_pairs().shape == (0, 2) and not statistics.sums.any()


def test_the_latest_micro_batches_are_kept() -> None:
    statistics = RoutingStatistics(ExpertGroups.from_config(MOE, 2), CPU)
    for index in range(_KEPT + 2):
        statistics.add(counted([[[float(index)] * 8] * 3]))
    # 3 modalities x 4 experts; the two oldest gave their places to the two latest.
    expected = [12 * index for index in (_KEPT, _KEPT + 1, *range(2, _KEPT))]
    assert statistics.rank_pairs().tolist() == [[pairs, pairs] for pairs in expected]


def test_imbalance_is_the_busiest_rank_over_the_mean_of_micro_batches_that_routed_anything() -> None:
    groups = ExpertGroups.from_config(MOE, 2)
    even, uneven = RoutingStatistics(groups, CPU), RoutingStatistics(groups, CPU)
    for ranks in ((1.0, 3.0), (0.0, 0.0), (0.0, 1.0)):
        even.add(counted([[[1.0] * 8] * 3]))
        uneven.add(counted([[[ranks[0]] * 4 + [ranks[1]] * 4] * 3]))
    single = RoutingStatistics(groups, CPU)  # one pair in one micro-batch, none in the others
    for pairs in (0.0, 1.0, 0.0):
        single.add(counted([[[pairs] + [0.0] * 7, [0.0] * 8, [0.0] * 8]]))
    imbalance = _rank_imbalance([even, uneven, single])
    assert imbalance.dtype == torch.float64
    assert imbalance.tolist() == [[3, 3], [1.5 + 2, 2], [2, 1]]


def test_imbalance_is_of_the_ranks_that_exchange_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda table, group=None: used.append(group))
    _rank_imbalance([RoutingStatistics(ExpertGroups.from_config(MOE, 2), CPU)])
    assert used == [parallel_state.get_expert_tensor_and_model_parallel_group()]
