"""Top-k expert selection per modality, with or without group-limited routing.

Group-limited routing divides a choice into spans of consecutive experts, the groups of DeepSeek. Tables have one row
for each plane (:mod:`megatron_most.moe.token_planes`): the M modalities and padding.

Shape letters: n tokens, E experts (physical order), M modalities, K largest top_k, S spans, L experts of a span.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_most.config import MoEConfig
from megatron_most.moe.expert_groups import ExpertGroups


class ExpertSelection:
    """Selects the ``top_k`` experts of each token's modality; if routing is group-limited, from its best spans only.

    No shape depends on how many tokens a modality has, so the host never waits for a count.
    """

    def __init__(self, moe: MoEConfig, groups: ExpertGroups, device: torch.device) -> None:
        self.max_top_k = moe.max_top_k
        top_k = torch.tensor([*groups.top_k, 0], device=device)
        self._is_taken = torch.arange(self.max_top_k, device=device) < top_k[:, None]
        self._is_group_limited = moe.is_group_limited
        if self._is_group_limited:
            # DeepSeek-V2 ranks a span by its best expert; DeepSeek-V3, with sigmoid scores, by the sum of its best two.
            self._num_ranking_experts = 2 if moe.moe_router_score_function == "sigmoid" else 1
            self._spans, self._span_of = (table.to(device) for table in _spans(moe, groups))
            group_topk = [group.moe_router_group_topk for group in moe.groups]
            self._group_topk = torch.tensor([*group_topk, group_topk[0]], device=device)

    def __call__(self, ranking: torch.Tensor, plane: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Select the experts of each token.

        Args:
            ranking: ``[n, E]``, larger is better; -inf where the token's modality may not choose.
            plane: ``[n]`` int64: the token's modality, or M for padding, which is routed to no expert.

        Returns:
            Experts ``[n, K]`` int64, best first and distinct in each row, and ``[n, K]`` bool, True for those the token
            is routed to: the first ``top_k`` of its modality.
        """
        if self._is_group_limited:
            ranking = self._within_best_spans(ranking, plane)
        experts = ranking.topk(self.max_top_k, dim=-1).indices
        return experts, self._is_taken[plane]

    def _within_best_spans(self, ranking: torch.Tensor, plane: torch.Tensor) -> torch.Tensor:
        """DeepSeek's group-limited routing (arXiv 2405.04434, section 2.2.2): -inf outside the best spans."""
        num_spans, span_length = self._spans.shape[1:]
        members = F.pad(ranking, (0, 1), value=float("-inf")).gather(1, self._spans[plane].flatten(1))
        num_best = min(self._num_ranking_experts, span_length)
        best = members.view(-1, num_spans, span_length).topk(num_best).values
        # A span of one expert has no second; a modality with fewer spans has no best in the others, which stay at -inf.
        second = best[..., 1:].masked_fill(best[..., 1:] == float("-inf"), 0.0)
        span_ranking = best[..., 0] + second.sum(dim=-1)
        order = span_ranking.argsort(dim=-1, descending=True)
        places = torch.arange(num_spans, device=ranking.device)
        is_kept = places < self._group_topk[plane][:, None]
        is_kept_span = torch.zeros_like(is_kept).scatter(1, order, is_kept)
        is_kept_expert = F.pad(is_kept_span, (0, 1)).gather(1, self._span_of[plane])
        return ranking.masked_fill(~is_kept_expert, float("-inf"))


def _spans(moe: MoEConfig, groups: ExpertGroups) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts of each span ``[M + 1, S, L]``, E for none, and the span of each expert ``[M + 1, E]``, S for none.

    Padding has the spans of the first modality.
    """
    physical = {expert: place for place, expert in enumerate(groups.physical_to_logical)}
    num_spans = max(group.moe_router_num_groups for group in moe.groups)
    span_length = max(
        len(choice) // group.moe_router_num_groups for choice, group in zip(groups.choices, moe.groups, strict=True)
    )
    spans = torch.full((len(moe.groups), num_spans, span_length), groups.num_experts)
    span_of = torch.full((len(moe.groups), groups.num_experts), num_spans)
    for modality, (choice, group) in enumerate(zip(groups.choices, moe.groups, strict=True)):
        length = len(choice) // group.moe_router_num_groups
        for place, expert in enumerate(choice):
            spans[modality, place // length, place % length] = physical[expert]
            span_of[modality, physical[expert]] = place // length
    return torch.cat([spans, spans[:1]]), torch.cat([span_of, span_of[:1]])
