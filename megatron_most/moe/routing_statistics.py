"""What the routers did, per layer and modality: counted on the device, summed over the ranks once per logged line.

Shape letters: M modalities, E experts, n tokens (of this rank), B sequences, R expert-parallel ranks, K micro-batches
kept, W columns: of pairs, scores and p log p E each, 1 of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_most import platform
from megatron_most.config import ModelConfig
from megatron_most.moe.balance import sum_by_modality
from megatron_most.moe.expert_groups import ExpertGroups

LOSSES = ("balance_loss", "z_loss", "orthogonality_loss")
"""Losses a router may report, each as a sum over tokens."""

_KEPT = 256
"""Micro-batches whose load per expert-parallel rank is kept until the next line; with more, the latest count."""


class RoutingStatistics:
    """Sums of one router since the last :func:`collect_routing`, on its device, never synchronized.

    All are float64, by modality and in physical expert order: ``routed [M, E]`` (token, expert) pairs;
    ``scores [M, E]`` scores; ``tokens [M]`` valid tokens; ``losses[name] [M]`` losses before their coefficients. They
    lie side by side in ``sums``, as :meth:`columns` cuts it.
    """

    def __init__(self, groups: ExpertGroups, device: torch.device) -> None:
        self._num_experts = groups.num_experts
        counted = 3 * groups.num_experts + 1
        self.sums = torch.zeros(len(groups.choices), counted + len(LOSSES), dtype=torch.float64, device=device)
        self._counted, losses = self.sums.split((counted, len(LOSSES)), dim=1)
        self.routed, self.scores, _, self.tokens, _ = self.columns(self.sums, groups.num_experts)
        self.losses = dict(zip(LOSSES, losses.unbind(1), strict=True))
        self._one = torch.ones(1, 1, device=device)
        self._rank_pairs = torch.zeros(_KEPT, groups.expert_parallel_size, device=device)
        self._num_calls = 0

    @staticmethod
    def columns(sums: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, ...]:
        """``sums`` -> pairs, scores and p log p ``[M, E]`` each, tokens ``[M]`` and losses ``[M, len(LOSSES)]``."""
        pairs, scores, p_log_p, tokens, losses = sums.split([num_experts] * 3 + [1, len(LOSSES)], dim=1)
        return pairs, scores, p_log_p, tokens.squeeze(1), losses

    @torch.no_grad()
    def count(
        self,
        routing_map: torch.Tensor,
        scores: torch.Tensor,
        group_probs: torch.Tensor,
        membership: torch.Tensor,
        num_sequences: int = 1,
    ) -> torch.Tensor:
        """Add the tokens of one micro-batch: one matrix product sums all there is to know of them.

        Args:
            routing_map: ``[n, E]`` bool.
            scores: ``[n, E]``, what the probabilities are taken from, before the choice; 0 where a token has none.
            group_probs: ``[n, E]``, the distribution inside each token's choice, 0 outside.
            membership: ``[M, n]`` fp32, 1 where the token is valid and of that modality, else 0.
            num_sequences: B; token i belongs to sequence ``i % B``.

        Returns:
            ``[B, M, E]`` fp32, the (token, expert) pairs of each sequence and modality.
        """
        p_log_p = torch.xlogy(group_probs, group_probs)
        columns = [routing_map, scores, p_log_p, self._one.expand(scores.shape[0], 1)]
        sums = sum_by_modality(membership, torch.cat(columns, dim=1), num_sequences)
        self._counted += sums[0] if num_sequences == 1 else sums.sum(dim=0)
        pairs = sums[..., : self._num_experts]
        num_ranks = self._rank_pairs.shape[1]
        if num_ranks > 1:
            by_rank = pairs.unflatten(-1, (num_ranks, -1))
            torch.sum(by_rank, dim=(0, 1, 3), out=self._rank_pairs[self._num_calls % _KEPT])
        self._num_calls += 1
        return pairs

    @torch.no_grad()
    def add_loss(self, name: str, value: torch.Tensor) -> None:
        """Add ``value [M]``, a loss of :data:`LOSSES` summed over this rank's tokens, before its coefficient."""
        self.losses[name] += value

    def rank_pairs(self) -> torch.Tensor:
        """``[K, R]`` pairs for each expert-parallel rank from this rank's tokens, of the last micro-batches."""
        return self._rank_pairs[: min(self._num_calls, _KEPT)]

    def reset(self) -> None:
        self.sums.zero_()
        self._num_calls = 0


def collect_routing(chunks: Iterable[torch.nn.Module], config: ModelConfig) -> list[dict[str, Any]]:
    """Sum the statistics of all ranks since the last call, and reset them. A collective call for every rank.

    Args:
        chunks: this rank's model chunks (wrapped or not); routers are found in them.
        config: the whole model; gives the place of each layer in the exchange.

    Returns:
        The same on every rank: one dict per MoE layer that saw tokens, in order. Its values are sums, so that those of
        several calls can be added: ``layer`` (its number, from 1; no sum); by modality ``pairs`` and ``scores`` per
        logical expert, ``entropy`` and ``tokens``; ``outside_group`` (pairs whose expert the modality may not choose);
        the :data:`LOSSES`; and ``rank_imbalance``: pairs of the busiest expert-parallel rank over the mean, summed over
        micro-batches, and how many those are (0 without expert parallelism).
    """
    groups = ExpertGroups.from_config(config.moe, parallel_state.get_expert_model_parallel_world_size())
    names = [group.modality for group in config.moe.groups]
    num_modalities, num_experts = len(names), groups.num_experts
    routers = [
        (module.layer_number - 1, module.statistics)
        for chunk in chunks
        for module in chunk.modules()
        if isinstance(getattr(module, "statistics", None), RoutingStatistics)
    ]
    width = num_modalities * (3 * num_experts + 1 + len(LOSSES))
    table = torch.zeros(config.num_layers, width + 2, dtype=torch.float64, device=platform.device())
    if routers:
        rows = [row for row, _ in routers]
        table[rows, :width] = torch.stack([statistics.sums.flatten() for _, statistics in routers])
        if groups.expert_parallel_size > 1:
            table[rows, width:] = _rank_imbalance([statistics for _, statistics in routers])
        for _, statistics in routers:
            statistics.reset()
    dist.all_reduce(table)

    layers = []
    for index, row in enumerate(table.cpu()):
        sums, imbalance = row.split((width, 2))
        pairs, scores, p_log_p, tokens, losses = RoutingStatistics.columns(sums.view(num_modalities, -1), num_experts)
        if not tokens.any():
            continue
        pairs, scores = groups.to_logical(pairs), groups.to_logical(scores)
        inside = sum(pairs[m, list(choice)].sum() for m, choice in enumerate(groups.choices))
        layers.append(
            {
                "layer": index + 1,
                "pairs": dict(zip(names, pairs.long().tolist(), strict=True)),
                "scores": dict(zip(names, scores.tolist(), strict=True)),
                "entropy": dict(zip(names, (-p_log_p.sum(dim=1)).tolist(), strict=True)),
                "tokens": dict(zip(names, tokens.long().tolist(), strict=True)),
                "outside_group": int(pairs.sum() - inside),
                **dict(zip(LOSSES, losses.sum(dim=0).tolist(), strict=True)),
                "rank_imbalance": imbalance.tolist(),
            }
        )
    return layers


def _rank_imbalance(statistics: list[RoutingStatistics]) -> torch.Tensor:
    """``[layers, 2]``: busiest rank over the mean, summed over micro-batches that routed anything, and their number.

    The ranks that exchange tokens run the same layers on micro-batches side by side.
    """
    pairs = torch.stack([one.rank_pairs() for one in statistics])
    dist.all_reduce(pairs, group=parallel_state.get_expert_tensor_and_model_parallel_group())
    has_pairs = pairs.sum(dim=-1) > 0
    ratio = (pairs.amax(dim=-1) / pairs.mean(dim=-1)).where(has_pairs, 0.0)
    return torch.stack([ratio.sum(dim=-1), has_pairs.sum(dim=-1)], dim=-1).double()
