"""What stands in for a kernel, and for other ranks, in tests of attention over packed rows."""

from __future__ import annotations

import itertools
from unittest import mock

import torch

from megatron_most.model import core_attention
from megatron_most.model.core_attention import PortableCoreAttention


def document_kernel(
    query, key, value, cum_q, cum_k, max_q, max_k, dropout, is_causal, debug, *, scale, aligns_ends=True
):
    """What stands in for torch's flash kernel on packed rows, and asks of its arguments what that does.

    The last query of a document sees all keys, or if not ``aligns_ends``, the first query sees the first key.
    """
    assert all(x.stride(-1) == 1 for x in (query, key, value)), "elements of a head follow each other"
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] and query.shape[1] % key.shape[1] == 0
    assert cum_q.dtype == cum_k.dtype == torch.int32
    assert (dropout, is_causal, debug) == (0.0, True, False)
    assert max_q >= int(cum_q.diff().max()) and max_k >= int(cum_k.diff().max())
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    outputs = []
    for queries, keys in zip(itertools.pairwise(cum_q.tolist()), itertools.pairwise(cum_k.tolist()), strict=True):
        q, k, v = query[slice(*queries)], key[slice(*keys)], value[slice(*keys)]
        is_later = torch.ones(len(q), len(k), dtype=torch.bool).triu(1 + (len(k) - len(q)) * aligns_ends)
        weights = (torch.einsum("qnd,knd->nqk", q, k) * scale).masked_fill(is_later, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("nqk,knd->qnd", weights, v))
    return torch.cat(outputs), None


def on_context_ranks(attention: PortableCoreAttention, inputs: list[torch.Tensor], row_of_rank) -> torch.Tensor:
    """The output of a whole packed row, attended by each rank with its share of the positions, in this process.

    Args:
        inputs: query, key and value of the whole row.
        row_of_rank: the packed row of each rank.
    """
    outputs = []
    for row in row_of_rank:
        query, key, value = (x[row.positions] for x in inputs)
        everyone = iter([torch.cat([x[other.positions] for other in row_of_rank]) for x in inputs[1:]])
        with mock.patch.object(
            core_attention,
            "gather_from_sequence_parallel_region",
            lambda mine, group, everyone=everyone: next(everyone),
        ):
            outputs.append(attention(query, key, value, None, packed_seq_params=row))
    order = torch.cat([row.positions for row in row_of_rank]).argsort()
    return torch.cat(outputs)[order]
