"""What the routers did: (token, expert) pairs per layer and modality, counted from the real routing maps.

Shape letters: M modalities, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_most import platform
from megatron_most.config import ModelConfig
from megatron_most.moe.expert_groups import ExpertGroups


class RoutingStatistics:
    """Counters of one router, accumulated on its device without synchronisation.

    ``routed [M, E]`` counts pairs in physical order, ``tokens [M]`` valid tokens, ``balance`` the sum over tokens of
    the balance loss (before its coefficient).
    """

    def __init__(self, num_modalities: int, num_experts: int, device: torch.device) -> None:
        self.routed = torch.zeros(num_modalities, num_experts, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(num_modalities, dtype=torch.float64, device=device)
        self.balance = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def count(self, routing_map: torch.Tensor, modality: torch.Tensor, is_valid: torch.Tensor) -> None:
        """Add ``routing_map [n, E]`` of tokens with ``modality [n]``; padding (``is_valid [n]`` False) is left out."""
        valid = is_valid.double()
        self.routed.index_add_(0, modality, routing_map.double() * valid[:, None])
        self.tokens.index_add_(0, modality, valid)

    def flat(self) -> torch.Tensor:
        return torch.cat([self.routed.flatten(), self.tokens, self.balance[None]])

    def reset(self) -> None:
        for counter in (self.routed, self.tokens, self.balance):
            counter.zero_()


def collect_routing(chunks: Iterable[torch.nn.Module], config: ModelConfig) -> list[dict[str, Any]]:
    """Sum the statistics of all ranks since the last call, and reset them. A collective call for every rank.

    Args:
        chunks: this rank's model chunks (wrapped or not); routers are found in them.
        config: the whole model; gives the place of each layer in the exchange.

    Returns:
        The same on every rank: one dict per MoE layer that saw tokens, in order: ``layer`` (from 1), for each modality
        the pairs per logical expert, ``tokens`` per modality, ``outside_group`` (pairs whose expert is not in the
        token's group) and ``balance_loss`` (mean over valid tokens; 1 when even).
    """
    groups = ExpertGroups.from_config(config.moe, parallel_state.get_expert_model_parallel_world_size())
    names = [group.modality for group in config.moe.groups]
    num_modalities, num_experts = len(names), groups.num_experts
    width = num_modalities * num_experts + num_modalities + 1
    table = torch.zeros(config.num_layers, width, dtype=torch.float64, device=platform.device())
    for chunk in chunks:
        for module in chunk.modules():
            statistics = getattr(module, "statistics", None)
            if isinstance(statistics, RoutingStatistics):
                table[module.layer_number - 1] = statistics.flat()
                statistics.reset()
    dist.all_reduce(table)
    table = table.cpu()

    layers = []
    for index, row in enumerate(table):
        tokens = row[num_modalities * num_experts : -1]
        if not tokens.any():
            continue
        routed = groups.to_logical(row[: num_modalities * num_experts].view(num_modalities, num_experts))
        inside = sum(routed[m, list(groups.choices[m])].sum() for m in range(num_modalities))
        layers.append(
            {
                "layer": index + 1,
                **{name: routed[m].long().tolist() for m, name in enumerate(names)},
                "tokens": {name: int(tokens[m]) for m, name in enumerate(names)},
                "outside_group": int(routed.sum() - inside),
                "balance_loss": float(row[-1] / tokens.sum()),
            }
        )
    return layers
