"""Causal attention on torch's scaled_dot_product_attention, for the portable spec.

Megatron's own portable attention takes no separate head sizes for keys and values, which multi-latent attention
needs, and knows no packed documents.

Shape letters: s query positions, k key positions, b rows, t positions of a packed row, n heads (of this rank),
d head size of queries and keys, v head size of values, D documents, L length of the longest document.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class PortableCoreAttention(MegatronModule):
    """Causal attention over rows, over packed documents, and over a key-value cache."""

    def __init__(self, config: TransformerConfig, *, softmax_scale: float, **spec_arguments: Any) -> None:
        """``spec_arguments`` are what Megatron hands to every core attention and this one reads off its inputs."""
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

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
            query: ``[s, b, n, d]``, or ``[t, n, d]`` when packed.
            key, value: ``[k, b, n, d]`` and ``[k, b, n, v]`` (``k >= s``: a cache precedes the queries), or packed.
            attention_mask: bool, broadcastable to ``[b, n, s, k]``, True where attention is forbidden beside causality.
            packed_seq_params: document boundaries; attention stays inside each document.

        Returns:
            ``[s, b, n * v]``, or ``[t, n * v]`` when packed.
        """
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params)
        num_queries, num_keys = query.shape[0], key.shape[0]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if attention_mask is None and num_queries == num_keys:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale)
        else:
            # The queries are the last positions of the keys.
            position = torch.arange(num_keys, device=query.device)
            may_attend = position[None, :] <= position[num_keys - num_queries :, None]
            if attention_mask is not None:
                may_attend = may_attend & ~attention_mask
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=may_attend, scale=self.softmax_scale)
        return out.permute(2, 0, 1, 3).reshape(num_queries, query.shape[1], -1)

    def _packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSeqParams
    ) -> torch.Tensor:
        """Pad the documents to a batch ``[D, n, L, .]``; causality keeps the padding behind them out of sight."""
        starts = packed.cu_seqlens_q[:-1].long()
        lengths = packed.cu_seqlens_q.diff().long()
        offset = torch.arange(packed.max_seqlen_q, device=query.device)
        is_position = offset[None, :] < lengths[:, None]
        positions = (starts[:, None] + offset[None, :]).masked_fill(~is_position, 0)
        q, k, v = (x[positions].transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale)
        return out.transpose(1, 2)[is_position].flatten(1)
