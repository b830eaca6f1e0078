"""Routers' statistics in tests: random tokens as a router hands them over, and the same sums from loops.

Shape letters: E experts, M modalities.
"""

from __future__ import annotations

import math

import torch

from megatron_most.config import CommonExpertsConfig, ExpertGroupConfig, ModelConfig, MoEConfig
from megatron_most.moe import ExpertGroups
from megatron_most.moe.routing_statistics import RoutingStatistics

MOE = MoEConfig(
    groups=[
        ExpertGroupConfig("text", 4, 2),
        ExpertGroupConfig("audio", 2, 1),
        ExpertGroupConfig("image", 0, 2),
    ],
    common=CommonExpertsConfig(2, modalities=["text", "image"]),
)
MODEL = ModelConfig(num_layers=3, moe=MOE)
NUM_TOKENS = 40


class Router(torch.nn.Module):
    """What :func:`collect_routing` looks for in a model."""

    def __init__(self, groups: ExpertGroups, layer_number: int) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.statistics = RoutingStatistics(groups, torch.device("cpu"))


def random_tokens(groups: ExpertGroups, seed: int) -> dict[str, torch.Tensor]:
    """What a router hands over for a micro-batch, scores over all experts, in physical order."""
    generator = torch.Generator().manual_seed(seed)
    modality = torch.randint(0, 3, (NUM_TOKENS,), generator=generator)
    is_valid = torch.rand(NUM_TOKENS, generator=generator) < 0.8
    logits = torch.randn(NUM_TOKENS, groups.num_experts, generator=generator)[:, list(groups.physical_to_logical)]
    group_logits = logits.masked_fill(~groups.allowed()[modality], float("-inf"))
    routing_map = torch.zeros_like(logits, dtype=torch.bool)
    for token, number in enumerate(modality.tolist()):
        routing_map[token, group_logits[token].topk(groups.top_k[number]).indices] = is_valid[token]
    return {
        "routing_map": routing_map,
        "scores": logits.softmax(dim=-1),
        "group_probs": group_logits.softmax(dim=-1),
        "modality": modality,
        "is_valid": is_valid,
    }


def count(router: Router, batch: dict[str, torch.Tensor]) -> None:
    """Count a batch as the router does."""
    modalities = torch.arange(len(MOE.groups))[:, None]
    membership = ((batch["modality"] == modalities) & batch["is_valid"]).float()
    router.statistics.count(batch["routing_map"], batch["scores"], batch["group_probs"], membership, num_sequences=2)


def by_hand(groups: ExpertGroups, seeds: range) -> dict[str, dict]:
    """The same sums from a loop over tokens and experts, in logical order."""
    names = ("text", "audio", "image")
    sums = {
        "pairs": {name: [0] * groups.num_experts for name in names},
        "scores": {name: [0.0] * groups.num_experts for name in names},
        "entropy": dict.fromkeys(names, 0.0),
        "tokens": dict.fromkeys(names, 0),
    }
    for seed in seeds:
        batch = random_tokens(groups, seed)
        for token in range(NUM_TOKENS):
            if not batch["is_valid"][token]:
                continue
            name = names[batch["modality"][token]]
            sums["tokens"][name] += 1
            for place, expert in enumerate(groups.physical_to_logical):
                sums["pairs"][name][expert] += int(batch["routing_map"][token, place])
                sums["scores"][name][expert] += batch["scores"][token, place].item()
                prob = batch["group_probs"][token, place].item()
                sums["entropy"][name] -= prob * math.log(prob) if prob else 0.0
    return sums
