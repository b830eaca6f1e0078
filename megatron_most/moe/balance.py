"""Load balancing inside each expert group.

Shape letters: n tokens, b sequences, E experts (physical order), M modalities.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def group_balance_loss(
    group_probs: torch.Tensor,
    routing_map: torch.Tensor,
    modality: torch.Tensor,
    sequence: torch.Tensor,
    is_valid: torch.Tensor,
    group_sizes: torch.Tensor,
    num_sequences: int,
    top_k: int,
    reduce_group: dist.ProcessGroup,
) -> torch.Tensor:
    """The Switch load-balancing loss of every (sequence, group), summed over this rank's tokens.

    For group g with E_g experts and T valid tokens in a sequence the loss is ``E_g * sum_i f_i * P_i``: ``f_i`` is the
    share of the group's T * top_k choices that fell on expert i, ``P_i`` the mean probability of expert i over the T
    tokens (Fedus et al., arXiv 2101.03961, eq. 4, here per group; per sequence as in DeepSeek-V2). An even load
    gives 1. Weighted by T, so that each token counts once whatever its group, the T of ``P_i`` cancels and the
    sum splits over the ranks that share a sequence.

    Args:
        group_probs: ``[n, E]`` softmax inside each token's group, zero outside.
        routing_map: ``[n, E]`` bool, the experts chosen.
        modality: ``[n]`` int64.
        sequence: ``[n]`` int64 in ``0 .. num_sequences - 1``; all zero balances over the whole micro-batch.
        is_valid: ``[n]`` bool, False for padding.
        group_sizes: ``[M]`` experts per group.
        reduce_group: ranks that hold other tokens of the same sequences (tensor x context parallel).

    Returns:
        Scalar: the sum over this rank's valid tokens of their group's loss. Dividing the sum over ``reduce_group`` by
        the number of valid tokens gives the mean.
    """
    num_groups = group_sizes.numel()
    bucket = sequence * num_groups + modality
    counts = group_probs.new_zeros(num_sequences * num_groups, routing_map.shape[1])
    counts.index_add_(0, bucket, (routing_map & is_valid[:, None]).to(counts.dtype))
    if reduce_group.size() > 1:
        dist.all_reduce(counts, group=reduce_group)
    choices = counts.sum(dim=1, keepdim=True).clamp(min=top_k)
    fractions = counts / choices
    per_token = (group_probs * fractions[bucket]).sum(dim=1) * group_sizes[modality]
    return (per_token * is_valid).sum()
