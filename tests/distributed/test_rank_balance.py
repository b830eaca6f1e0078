"""How many tokens the experts of each expert-parallel rank really receive, in both expert orders and several mixes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_most import parallel
from megatron_most.model import build_model
from megatron_most.moe import collect_routing
from megatron_most.moe.token_planes import pack_planes
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import tiny_config

TOKENS_PER_RANK = 4096
AUDIO_SHARES = (0.5, 0.2, 0.05)
DISPATCHERS = ("alltoall", "allgather")


def received_and_metric(ep_size: int, order: str, dispatcher: str) -> list[tuple[int, float]]:
    """For each of :data:`AUDIO_SHARES`: rows that this rank's experts computed, and the imbalance that is logged."""
    config = tiny_config(
        model__num_layers=2,
        model__moe__groups="[{modality: text, size: 16, moe_router_topk: 2},"
        " {modality: audio, size: 16, moe_router_topk: 2}]",
        model__moe__expert_order=order,
        model__moe__moe_token_dispatcher_type=dispatcher,
        parallel__expert_model_parallel_size=ep_size,
    )
    parallel.initialize(config.parallel, seed=1)
    chunks = build_model(config)
    moe_layer = chunks[0].decoder.layers[1].mlp
    # Orthonormal rows make the logits of normal hidden states independent and alike: every choice is as likely.
    torch.nn.init.orthogonal_(moe_layer.router.weight, generator=torch.Generator().manual_seed(2))
    rows: list[int] = []
    moe_layer.experts.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    metric = []
    for audio_share in AUDIO_SHARES:
        hidden = torch.randn(TOKENS_PER_RANK, 1, config.model.hidden_size, generator=generator)
        modality = (torch.rand(1, TOKENS_PER_RANK, generator=generator) < audio_share).long()
        moe_layer(hidden, padding_mask=pack_planes(modality, torch.zeros_like(modality), num_modalities=2))
        [routing] = collect_routing(chunks, config.model)
        total, num_calls = routing["rank_imbalance"]
        metric.append(total / num_calls)
    return list(zip(rows, metric, strict=True))


def observe_orders(ep_size: int) -> dict[tuple[str, str], Any]:
    return {
        (order, dispatcher): received_and_metric(ep_size, order, dispatcher)
        for order in ("interleaved", "contiguous")
        for dispatcher in DISPATCHERS
    }


@pytest.mark.parametrize("ep_size", [2, 4])
def test_interleaved_ranks_receive_alike_and_contiguous_ones_what_the_mix_gives_them(ep_size):
    ranks = run_ranks(ep_size, observe_orders, ep_size)
    for order, dispatcher in ranks[0]:
        for index, audio_share in enumerate(AUDIO_SHARES):
            where = f"{order}, {dispatcher}, {audio_share:.0%} audio"
            received = [rank[order, dispatcher][index][0] for rank in ranks]
            assert sum(received) == 2 * ep_size * TOKENS_PER_RANK, where
            busiest = max(received) * ep_size / sum(received)
            if order == "interleaved":
                assert busiest <= 1.05, where
            else:
                assert busiest == pytest.approx(2 * max(audio_share, 1 - audio_share), rel=0.05), where
            for rank in ranks:
                assert rank[order, dispatcher][index][1] == pytest.approx(busiest, rel=1e-6), where
