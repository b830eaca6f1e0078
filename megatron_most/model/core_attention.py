"""Causal attention on torch's scaled_dot_product_attention, for the portable spec.

Megatron's own portable attention takes no separate head sizes for keys and values, which multi-latent attention
needs, and knows neither packed documents nor context parallelism.

Shape letters: s query positions and k key positions (of this rank), b rows, t positions of a row over all
context-parallel ranks, n query heads and g key-value heads (of this rank; query head i reads key-value head
i * g // n), d head size of queries and keys, v head size of values.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_most.model.packed_row import PackedRow
from megatron_most.parallel import zigzag_positions


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
        packed_seq_params: PackedRow | None = None,
    ) -> torch.Tensor:
        """Attend causally.

        Args:
            query: ``[s, b, n, d]``, or ``[s, n, d]`` when packed.
            key, value: ``[k, b, g, d]`` and ``[k, b, g, v]`` (``k >= s``: a cache precedes the queries), or packed.
            attention_mask: broadcastable to ``[b, n, s, k]``. bool: True where attention is forbidden beside causality.
                Of the dtype of queries: what is added to the logits, causality included.
            packed_seq_params: the documents of the whole row, as this rank sees them; attention stays inside each.

        Returns:
            ``[s, b, n * v]``, or ``[s, n * v]`` when packed.
        """
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params)
        num_queries, size, device = query.shape[0], self.cp_group.size(), key.device
        if size > 1:
            shares = [zigzag_positions(key.shape[0] * size, rank, size, device) for rank in range(size)]
            gather_order = torch.cat(shares).argsort()
            key, value = self._whole_row(key, gather_order), self._whole_row(value, gather_order)
        may_attend = None
        if attention_mask is not None and attention_mask.is_floating_point():
            may_attend = attention_mask
        elif attention_mask is not None or num_queries < key.shape[0]:
            key_at = torch.arange(key.shape[0], device=device)
            query_at = shares[self.cp_group.rank()] if size > 1 else key_at[-num_queries:]
            may_attend = key_at <= query_at[:, None]
            if attention_mask is not None:
                may_attend = may_attend & ~attention_mask
        out = self._attend(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), may_attend)
        return out.transpose(0, 1).flatten(2)

    def _packed(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: PackedRow) -> torch.Tensor:
        """``[s, n, d]``, ``[s, g, d]``, ``[s, g, v]`` -> ``[s, n * v]``, without waiting for the device."""
        if row.gather_order is not None:
            key, value = self._whole_row(key, row.gather_order), self._whole_row(value, row.gather_order)
        outputs = []
        for batch in row.batches:
            may_attend = None if batch.query_at is None else batch.key_at <= batch.query_at
            out = self._attend(query[batch.query_index], key[batch.key_index], value[batch.key_index], may_attend)
            outputs.append(out.flatten(0, 1))
        return torch.cat(outputs)[row.output_order].flatten(1)

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, may_attend: torch.Tensor | None
    ) -> torch.Tensor:
        """``[b, s, n, d]``, ``[b, k, g, d]``, ``[b, k, g, v]`` -> ``[b, s, n, v]``; causal without ``may_attend``."""
        if may_attend is not None and q.shape[2] != k.shape[2]:
            # On a GPU the kernel that takes a mask and needs no memory for the logits knows no grouped queries.
            k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
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

    def _whole_row(self, mine: torch.Tensor, gather_order: torch.Tensor) -> torch.Tensor:
        """This rank's positions ``[t / size, ...]`` -> those of all context ranks ``[t, ...]``, in the row's order."""
        return gather_from_sequence_parallel_region(mine, group=self.cp_group)[gather_order]
