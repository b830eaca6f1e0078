"""Routing statistics per layer and modality, accumulated on the device and reduced over ranks once per logged line.

Shape letters: M modalities, E experts, n tokens (of this rank), B sequences, R expert-parallel ranks, K micro-batches
kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_most import platform
from megatron_most.config import ModelConfig
from megatron_most.moe.balance import sum_by_modality
from megatron_most.moe.expert_groups import ExpertGroups

LOSSES = ("balance_loss", "z_loss", "orthogonality_loss")
"""Auxiliary losses that a router may report, each as a sum over tokens."""

_KEPT = 256
"""The load per expert-parallel rank is kept for this many micro-batches: the latest since the previous line."""


class RoutingStatistics:
    """Sums of one router on this rank since the last :func:`collect_routing`; the host never waits for them.

    All are float64, by modality and in physical expert order: ``routed [M, E]`` (token, expert) pairs;
    ``scores [M, E]`` scores; ``tokens [M]`` valid tokens; ``losses[name] [M]`` losses without their coefficients. They
    are views of the columns of ``sums``, see :meth:`columns`.
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
        """Add the tokens of one micro-batch, with one matrix product for all columns.

        Args:
            routing_map: ``[n, E]`` bool.
            scores: ``[n, E]``, see :func:`~megatron_most.moe.scores.expert_scores`.
            group_probs: ``[n, E]``, the distribution over each token's choice, 0 outside.
            membership: ``[M, n]`` fp32, 1 where the token is valid and of that modality, else 0.
            num_sequences: B; token i belongs to sequence ``i % B``.

        Returns:
            ``[B, M, E]`` fp32, the (token, expert) pairs of each sequence and modality.
        """
        p_log_p = torch.xlogy(group_probs, group_probs)
        columns = [routing_map, scores, p_log_p, self._one.expand(scores.shape[0], 1)]
        return self.add(sum_by_modality(membership, torch.cat(columns, dim=1), num_sequences))

    @torch.no_grad()
    def add(self, counted: torch.Tensor) -> torch.Tensor:
        """Add sums over the tokens of one micro-batch.

        Args:
            counted: ``[B, M, 3 * E + 1]`` fp32: pairs, scores and p log p by expert, and tokens.

        Returns:
            As :meth:`count`.
        """
        self._counted += counted[0] if len(counted) == 1 else counted.sum(dim=0)
        pairs = counted[..., : self._num_experts]
        num_ranks = self._rank_pairs.shape[1]
        if num_ranks > 1:
            by_rank = pairs.unflatten(-1, (num_ranks, -1))
            torch.sum(by_rank, dim=(0, 1, 3), out=self._rank_pairs[self._num_calls % _KEPT])
        self._num_calls += 1
        return pairs

    @torch.no_grad()
    def add_loss(self, name: str, value: torch.Tensor) -> None:
        """Add ``value [M]``, a loss of :data:`LOSSES` summed over this rank's tokens, without its coefficient."""
        self.losses[name] += value

    def rank_pairs(self) -> torch.Tensor:
        """``[K, R]``: pairs that this rank's tokens sent to each expert-parallel rank in the last micro-batches."""
        return self._rank_pairs[: min(self._num_calls, _KEPT)]

    def reset(self) -> None:
        self.sums.zero_()
        self._num_calls = 0


def collect_routing(chunks: Iterable[torch.nn.Module], config: ModelConfig) -> list[dict[str, Any]]:
    """Sum the statistics since the last call over all ranks, and reset them. Collective.

    Args:
        chunks: this rank's model chunks, wrapped or not.
        config: the whole model, of which a pipeline stage has only some layers.

    Returns:
        One dict for each MoE layer that had tokens, in order; the same on every rank. ``layer`` is its number, from 1.
        All other values are sums, so that the results of several calls can be added: by modality, ``pairs`` and
        ``scores`` per logical expert, ``entropy`` and ``tokens``; ``outside_group``, pairs whose expert the modality
        may not choose; the :data:`LOSSES`; and ``rank_imbalance``: the pairs of the busiest expert-parallel rank over
        the mean, summed over micro-batches, and the number of those micro-batches (0 without expert parallelism).
    """
    groups = ExpertGroups.from_config(config.moe, parallel_state.get_expert_model_parallel_world_size())
    names = [group.modality for group in config.moe.groups]
    num_modalities, num_experts = len(names), groups.num_experts
    routers = list(_statistics_by_layer(chunks))
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


def _statistics_by_layer(chunks: Iterable[torch.nn.Module]) -> Iterator[tuple[int, RoutingStatistics]]:
    """(index of the layer in the model, its statistics) of this rank's routers."""
    for chunk in chunks:
        for module in chunk.modules():
            # Not by the router's class, whose module imports this one.
            statistics = getattr(module, "statistics", None)
            if isinstance(statistics, RoutingStatistics):
                layer_number = module.layer_number
                assert isinstance(layer_number, int)
                yield layer_number - 1, statistics


def _rank_imbalance(statistics: list[RoutingStatistics]) -> torch.Tensor:
    """``[layers, 2]``: busiest rank over the mean, summed over micro-batches that routed anything, and their number.

    The ranks of an expert-parallel group run the same layers on as many micro-batches at the same time.
    """
    pairs = torch.stack([one.rank_pairs() for one in statistics])
    dist.all_reduce(pairs, group=parallel_state.get_expert_tensor_and_model_parallel_group())
    has_pairs = pairs.sum(dim=-1) > 0
    ratio = (pairs.amax(dim=-1) / pairs.mean(dim=-1)).where(has_pairs, 0.0)
    return torch.stack([ratio.sum(dim=-1), has_pairs.sum(dim=-1)], dim=-1).double()
