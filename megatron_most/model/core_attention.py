"""Causal attention on torch's scaled_dot_product_attention, for the portable spec.

Megatron's own portable attention takes no separate head sizes for keys and values, which multi-latent attention
needs, and knows neither packed documents nor context parallelism.

Shape letters: s query positions and k key positions (of this rank), b rows, t positions of a packed row over all
context-parallel ranks, n query heads and g key-value heads (of this rank; query head i reads key-value head
i * g // n), d head size of queries and keys, v head size of values; of a few documents of similar length: D their
number, L positions and l positions on this rank of the longest.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_most.parallel import zigzag_positions_packed


class PortableCoreAttention(MegatronModule):
    """Causal attention over rows, over packed documents, and over a key-value cache.

    Under context parallelism every rank attends from its own queries to the keys and values of all ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        softmax_scale: float | None,
        pg_collection: ProcessGroupCollection,
        **spec_arguments: Any,
    ) -> None:
        """``spec_arguments`` are what Megatron hands to every core attention and this one reads off its inputs.

        ``softmax_scale`` multiplies the logits; None stands for one over the square root of the head size.
        """
        super().__init__(config=config)
        self.softmax_scale = 1 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend causally.

        Args:
            query: ``[s, b, n, d]``, or ``[s, n, d]`` when packed.
            key, value: ``[k, b, g, d]`` and ``[k, b, g, v]`` (``k >= s``: a cache precedes the queries), or packed.
            attention_mask: bool, broadcastable to ``[b, n, s, k]``, True where attention is forbidden beside causality.
            packed_seq_params: boundaries of the documents in the whole row; attention stays inside each document.

        Returns:
            ``[s, b, n * v]``, or ``[s, n * v]`` when packed.
        """
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params.cu_seqlens_q)
        num_queries, size = query.shape[0], self.cp_group.size()
        if size > 1:
            row = torch.tensor([0, key.shape[0] * size], device=key.device)
            key, value = self._whole_row(key, row), self._whole_row(value, row)
            query_at = zigzag_positions_packed(row, self.cp_group.rank(), size)
        else:
            query_at = torch.arange(key.shape[0] - num_queries, key.shape[0], device=key.device)
        may_attend = None
        if attention_mask is not None or num_queries < key.shape[0]:
            may_attend = torch.arange(key.shape[0], device=key.device) <= query_at[:, None]
            if attention_mask is not None:
                may_attend = may_attend & ~attention_mask
        out = self._attend(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), may_attend)
        return out.transpose(0, 1).flatten(2)

    def _packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor
    ) -> torch.Tensor:
        """Documents whose lengths share their highest bit become one batch: few calls, less than half of it padding."""
        size = self.cp_group.size()
        if size > 1:
            key, value = self._whole_row(key, cu_seqlens), self._whole_row(value, cu_seqlens)
        query_at = zigzag_positions_packed(cu_seqlens, self.cp_group.rank(), size)
        starts, lengths = cu_seqlens[:-1, None].long(), cu_seqlens.diff()[:, None].long()
        magnitude = torch.frexp(lengths[:, 0].double()).exponent
        outputs, places = [], []
        for documents in (magnitude == m for m in magnitude.unique()):
            start, length = starts[documents], lengths[documents]
            # Beyond its end a document repeats its last position: causality hides it as a key, and below as a query.
            key_offset = torch.arange(int(length.max()), device=key.device)
            query_offset = torch.arange(int(length.max()) // size, device=key.device)
            key_index = start + key_offset.minimum(length - 1)  # [D, L]
            query_index = start // size + query_offset.minimum(length // size - 1)  # [D, l]
            may_attend = None
            if size > 1:
                may_attend = ((start + key_offset)[:, None] <= query_at[query_index][:, :, None])[:, None]
            out = self._attend(query[query_index], key[key_index], value[key_index], may_attend)
            is_query = query_offset < length // size
            outputs.append(out[is_query])
            places.append(query_index[is_query])
        return torch.cat(outputs)[torch.cat(places).argsort()].flatten(1)

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, may_attend: torch.Tensor | None
    ) -> torch.Tensor:
        """``[b, s, n, d]``, ``[b, k, g, d]``, ``[b, k, g, v]`` -> ``[b, s, n, v]``; causal without ``may_attend``."""
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=may_attend,
            is_causal=may_attend is None,
            scale=self.softmax_scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return out.transpose(1, 2)

    def _whole_row(self, mine: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """This rank's positions ``[t / size, ...]`` -> those of all context ranks ``[t, ...]``, in the row's order."""
        size = self.cp_group.size()
        held = torch.cat([zigzag_positions_packed(cu_seqlens, rank, size) for rank in range(size)])
        return gather_from_sequence_parallel_region(mine, group=self.cp_group)[held.argsort()]
