"""How evenly experts load expert-parallel ranks when tokens choose uniformly inside their group."""

import pytest
import torch

from megatron_most.config import ExpertGroupConfig, MoEConfig
from megatron_most.moe.expert_groups import ExpertGroups

TOKENS_PER_RANK = 4096


def busiest_rank(order: str, ep_size: int, audio_share: float) -> float:
    """Tokens on the busiest of ``ep_size`` ranks over the mean, 32 text and 32 audio experts, top-6."""
    config = MoEConfig(groups=[ExpertGroupConfig("text", 32, 6), ExpertGroupConfig("audio", 32, 6)], expert_order=order)
    groups = ExpertGroups.from_config(config, ep_size)
    generator = torch.Generator().manual_seed(ep_size)
    num_tokens = TOKENS_PER_RANK * ep_size
    modality = (torch.arange(num_tokens) < audio_share * num_tokens).long()
    scores = torch.rand(num_tokens, groups.num_experts, generator=generator)
    chosen = scores.masked_fill(~groups.allowed()[modality], -1).topk(config.max_top_k).indices
    per_expert = torch.bincount(chosen.flatten(), minlength=groups.num_experts)
    per_rank = per_expert.view(ep_size, -1).sum(dim=1).double()
    return (per_rank.max() / per_rank.mean()).item()


@pytest.mark.parametrize("audio_share", [0.5, 0.2, 0.05])
@pytest.mark.parametrize("ep_size", [2, 4, 8, 16])
def test_interleaved_ranks_are_even_and_contiguous_ones_follow_the_mix(ep_size, audio_share):
    assert busiest_rank("interleaved", ep_size, audio_share) <= 1.05
    expected = 2 * max(audio_share, 1 - audio_share)
    assert busiest_rank("contiguous", ep_size, audio_share) == pytest.approx(expected, rel=0.05)
