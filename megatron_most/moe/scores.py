"""From the router's logits to the scores of the experts and the probabilities of those chosen.

Shape letters: n tokens, E experts, K largest top_k.
"""

from __future__ import annotations

import torch

from megatron_most.config import MoEConfig


def expert_scores(logits: torch.Tensor, group_logits: torch.Tensor, moe: MoEConfig) -> torch.Tensor:
    """Scores of all experts, from which the probabilities of the chosen ones are taken.

    Args:
        logits: ``[n, E]`` fp32.
        group_logits: the same with -inf outside the token's choice.

    Returns:
        ``[n, E]``. ``softmax`` is taken over the choice (score rule ``group``) or over all experts (score rule ``all``,
        as in MoST, arXiv 2601.10272). ``sigmoid`` is applied to each logit, which gives 0 outside the choice
        (DeepSeek-V3, arXiv 2412.19437, eq. 15).
    """
    if moe.moe_router_score_function == "sigmoid":
        return torch.sigmoid(group_logits)
    return torch.softmax(group_logits if moe.score_rule == "group" else logits, dim=-1)


def choice_distribution(scores: torch.Tensor, group_logits: torch.Tensor, moe: MoEConfig) -> torch.Tensor:
    """``[n, E]``: the distribution over the token's choice, 0 outside, for losses and statistics."""
    if moe.moe_router_score_function == "sigmoid":
        return _normalized(scores, scores)
    return scores if moe.score_rule == "group" else torch.softmax(group_logits, dim=-1)


def gates(
    scores: torch.Tensor, routing_map: torch.Tensor, experts: torch.Tensor, is_taken: torch.Tensor, moe: MoEConfig
) -> torch.Tensor:
    """``[n, E]``: the factor of each chosen expert's output, 0 for the others.

    Args:
        routing_map: ``[n, E]`` bool.
        experts, is_taken: the same as ``[n, K]``, best first. Scores are summed in this order, as in Megatron.
    """
    chosen = scores * routing_map
    if moe.norm_topk_prob:
        chosen = _normalized(chosen, scores.gather(1, experts) * is_taken)
    return chosen if moe.moe_router_topk_scaling_factor == 1 else chosen * moe.moe_router_topk_scaling_factor


def _normalized(scores: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Scores over the sum of each row's ``counted`` scores; rows of zeros stay zeros.

    No epsilon is added: under the score rule ``all``, the sum may be tiny.
    """
    total = counted.sum(dim=-1, keepdim=True)
    return scores / (total + (total == 0))
