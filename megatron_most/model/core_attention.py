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
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_most.parallel import zigzag_positions


class PortableCoreAttention(MegatronModule):
    """Causal attention over rows, over packed documents, and over a key-value cache.

    Under context parallelism every rank attends from its own queries to the keys and values of all ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        softmax_scale: float,
        pg_collection: ProcessGroupCollection,
        **spec_arguments: Any,
    ) -> None:
        """``spec_arguments`` are what Megatron hands to every core attention and this one reads off its inputs."""
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
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
            query: ``[s, b, n, d]``, or ``[t, n, d]`` when packed.
            key, value: ``[k, b, n, d]`` and ``[k, b, n, v]`` (``k >= s``: a cache precedes the queries), or packed.
            attention_mask: bool, broadcastable to ``[b, n, s, k]``, True where attention is forbidden beside causality.
            packed_seq_params: document boundaries; attention stays inside each document.

        Returns:
            ``[s, b, n * v]``, or ``[t, n * v]`` when packed.
        """
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params)
        if self.cp_group.size() > 1:
            key = gather_from_sequence_parallel_region(key, group=self.cp_group)
            value = gather_from_sequence_parallel_region(value, group=self.cp_group)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if attention_mask is None and query.shape[0] == key.shape[0]:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale)
        else:
            query_at, key_at = self._positions(query.shape[0], key.shape[0], query.device)
            may_attend = key_at[None, :] <= query_at[:, None]
            if attention_mask is not None:
                may_attend = may_attend & ~attention_mask
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=may_attend, scale=self.softmax_scale)
        return out.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)

    def _positions(self, num_queries: int, num_keys: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the queries ``[s]`` and the keys ``[k]`` stand in the sequence.

        Without context parallelism the queries are the last of the keys. With it, the keys are those of all ranks in
        rank order, and each rank holds its zigzag share.
        """
        size = self.cp_group.size()
        if size == 1:
            position = torch.arange(num_keys, device=device)
            return position[num_keys - num_queries :], position
        shares = [zigzag_positions(num_keys, rank, size).to(device) for rank in range(size)]
        return shares[self.cp_group.rank()], torch.cat(shares)

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
        num_positions = query.shape[0]
        document = torch.repeat_interleave(lengths, output_size=num_positions)
        place = torch.arange(num_positions, device=query.device) - starts[document]
        return out.transpose(1, 2)[document, place].flatten(1)
