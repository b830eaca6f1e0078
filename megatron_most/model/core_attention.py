"""Causal attention on torch's scaled_dot_product_attention, for the portable spec.

Megatron's portable attention supports neither different head sizes of keys and values, which multi-latent attention
needs, nor packed documents, nor context parallelism.

Shape letters: s query positions and k key positions (of this rank), b rows, t positions of a row over all
context-parallel ranks, n query heads and g key-value heads (of this rank; query head i reads key-value head
i * g // n), d head size of queries and keys, v head size of values.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_most import platform
from megatron_most.model.packed_row import PackedRow
from megatron_most.parallel import zigzag_positions


class PortableCoreAttention(MegatronModule):
    """Causal attention over rows, over packed documents, and over a key-value cache.

    Under context parallelism, every rank gathers the keys and values of all ranks and attends with its own queries.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        softmax_scale: float | None,
        pg_collection: ProcessGroupCollection,
        k_channels: int | None = None,
        **spec_arguments: Any,
    ) -> None:
        """Build the module.

        Args:
            softmax_scale: factor on the logits. None: one over the square root of the head size.
            k_channels: head size d. None: ``config.kv_channels``.
            spec_arguments: arguments that Megatron passes to every core attention; not needed here.
        """
        super().__init__(config=config)
        self.softmax_scale = 1 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        self.cp_group = pg_collection.cp
        self.document_kernel = platform.document_attention(k_channels or config.kv_channels, config.params_dtype)

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
            key, value: ``[k, b, g, d]`` and ``[k, b, g, v]``, or without b when packed; ``k > s`` with a cache.
            attention_mask: broadcastable to ``[b, n, s, k]``. A bool mask is True where attention is forbidden, in
                addition to causality. A floating-point mask is added to the logits and must include causality.
            packed_seq_params: the documents of the row. Attention does not cross their boundaries.

        Returns:
            ``[s, b, n * v]``, or ``[s, n * v]`` when packed.
        """
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params)
        size = self.cp_group.size()
        if size > 1:
            order = _zigzag_order(key.shape[0] * size, size, key.device)
            key, value = self._whole_row(key, order), self._whole_row(value, order)
        may_attend, is_causal = self._mask(query.shape[0], key.shape[0], key.device, attention_mask)
        out = self._attend(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), may_attend, is_causal)
        return out.transpose(0, 1).flatten(2)

    def _mask(
        self, num_queries: int, num_keys: int, device: torch.device, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, bool]:
        """(mask, is_causal) for the kernel: the mask, which includes causality, or None. One query sees all keys."""
        if attention_mask is not None and attention_mask.is_floating_point():
            return attention_mask, False
        if num_queries == 1:
            return None if attention_mask is None else ~attention_mask, False
        if attention_mask is None and num_queries == num_keys:
            return None, True
        key_at = torch.arange(num_keys, device=device)
        size = self.cp_group.size()
        query_at = key_at[-num_queries:]
        if size > 1:
            query_at = zigzag_positions(num_keys, self.cp_group.rank(), size, device)
        may_attend = key_at <= query_at[:, None]
        return may_attend if attention_mask is None else may_attend & ~attention_mask, False

    def _packed(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: PackedRow) -> torch.Tensor:
        """``[s, n, d]``, ``[s, g, d]``, ``[s, g, v]`` -> ``[s, n * v]``, without waiting for the device."""
        if self.document_kernel is not None:
            pieces = row.pieces
            if pieces.key_index is not None:
                key, value = self._whole_row(key, pieces.key_index), self._whole_row(value, pieces.key_index)
            out = self.document_kernel(
                query,
                key,
                _filled_up(value, key),
                pieces.query_boundaries,
                pieces.key_boundaries,
                pieces.max_queries,
                pieces.max_keys,
                0.0,  # dropout
                True,  # causal
                False,  # no mask to debug
                scale=self.softmax_scale,
            )[0]
            return out[..., : value.shape[-1]].flatten(1)
        batches = row.batches
        if batches.gather_order is not None:
            key, value = self._whole_row(key, batches.gather_order), self._whole_row(value, batches.gather_order)
        outputs = []
        for batch in batches.documents:
            q, k, v = query[batch.query_index], key[batch.key_index], value[batch.key_index]
            outputs.append(self._attend(q, k, v, batch.may_attend(), batch.query_at is None).flatten(0, 1))
        return torch.cat(outputs)[batches.output_order].flatten(1)

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, may_attend: torch.Tensor | None, is_causal: bool
    ) -> torch.Tensor:
        """``[b, s, n, d]``, ``[b, k, g, d]``, ``[b, k, g, v]`` -> ``[b, s, n, v]``."""
        value_size = v.shape[-1]
        if is_causal and platform.wants_equal_head_sizes(k.shape[-1], value_size, k.dtype):
            v = _filled_up(v, k)
        if may_attend is not None and q.shape[2] != k.shape[2]:
            # On a GPU, the memory-efficient kernel, which takes a mask, does not support grouped queries.
            k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=may_attend,
            is_causal=is_causal,
            scale=self.softmax_scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return out.transpose(1, 2)[..., :value_size]

    def _whole_row(self, mine: torch.Tensor, gather_order: torch.Tensor) -> torch.Tensor:
        """This rank's positions ``[t / size, ...]`` -> ``gather_order`` of those of all context-parallel ranks."""
        return gather_from_sequence_parallel_region(mine, group=self.cp_group).index_select(0, gather_order)


def _filled_up(value: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """``[..., v]`` -> ``[..., d]`` for kernels that need equal head sizes. The caller drops the added output.

    Any finite numbers will do. Copying them from the keys takes fewer kernels than creating zeros.
    """
    missing = key.shape[-1] - value.shape[-1]
    return value if missing <= 0 else torch.cat([value, key[..., :missing].detach()], dim=-1)


@functools.lru_cache(maxsize=8)
def _zigzag_order(length: int, size: int, device: torch.device) -> torch.Tensor:
    """``[t]``: the index of each position of a row in the concatenation of all context-parallel ranks' positions."""
    return torch.cat([zigzag_positions(length, rank, size, device) for rank in range(size)]).argsort()
