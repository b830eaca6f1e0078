"""Attention layers that share one table of rotary embeddings, computed once per model.

Megatron's layers compute cosines and sines in every layer, separately for queries and keys.

Shape letters: s positions of this rank (r of them under sequence parallelism), b rows, h hidden size, n query heads of
this rank and g key-value heads, d head size of queries and keys, v head size of values.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import Attention, SelfAttention
from megatron.core.transformer.multi_latent_attention import (
    FusedMLASelfAttention,
    MLASelfAttention,
    MLASelfAttentionSubmodules,
)

from megatron_most.model.core_attention import PortableCoreAttention
from megatron_most.model.key_value_cache import KeyValueCache
from megatron_most.model.norm import AllHeadsNorm
from megatron_most.model.packed_row import PackedRow
from megatron_most.model.rotary import rotate_halves, rotate_pairs


class _RotatedAttention(Attention):
    """The part that both kinds share: rotate, update the cache, attend, project."""

    @abstractmethod
    def _rotated(self, hidden_states: torch.Tensor, rotations: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``[r, b, h]`` -> queries ``[s, b, n, d]``, keys ``[s, b, g, d]`` and values ``[s, b, g, v]``."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        inference_context: KeyValueCache | None = None,
        rotary_pos_emb: torch.Tensor | None = None,
        packed_seq_params: PackedRow | None = None,
        **unused: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``[r, b, h]`` -> ``[r, b, h]`` and no bias.

        Args:
            rotary_pos_emb: :class:`~megatron_most.model.rotary.Rotations` at the positions of ``hidden_states``.
            unused: arguments that Megatron passes to other kinds of attention.
        """
        assert rotary_pos_emb is not None
        query, key, value = self._rotated(hidden_states, rotary_pos_emb)
        if inference_context is not None:
            key, value = inference_context.update(self.layer_number, key, value)
        if packed_seq_params is not None:
            query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        attend = self.core_attention
        if not isinstance(attend, PortableCoreAttention):
            # Transformer Engine needs contiguous tensors, and Megatron's wrapper pads the values of packed rows for it.
            attend = self._run_core_attention
            query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        out = attend(
            query,
            key,
            value,
            attention_mask,
            attn_mask_type=self.attn_mask_type,
            packed_seq_params=packed_seq_params,
        )
        if packed_seq_params is not None:
            out = out.reshape(len(out), 1, -1)
        return self.linear_proj(out)


class GroupedQueryAttention(_RotatedAttention, SelfAttention):
    """Megatron's grouped-query attention. The whole head is rotated: number i is paired with number i + d / 2.

    Args:
        norms_all_heads: whether queries and keys have a norm over all heads. Norms of single heads are Megatron's.
    """

    def __init__(self, *arguments: Any, norms_all_heads: bool = False, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if norms_all_heads:
            size, group = self.hidden_size_per_attention_head, self.pg_collection.tp
            self.q_layernorm = AllHeadsNorm(self.config, self.num_attention_heads_per_partition, size, group)
            self.k_layernorm = AllHeadsNorm(self.config, self.num_query_groups_per_partition, size, group)

    def _rotated(self, hidden_states: torch.Tensor, rotations: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        return rotate_halves(query, rotations), rotate_halves(key, rotations), value


class MultiLatentAttention(_RotatedAttention, MLASelfAttention):
    """Megatron's multi-latent attention, built from exactly the modules that its submodules name.

    If keys have a norm and queries have no low rank, Megatron (0.19.2, mla_qk_norm_config.py) adds a norm of queries.
    DeepSeek-V2-Lite has none.

    Args:
        norm_epsilon: of the latents' norms; None for that of all norms.
    """

    def __init__(self, *arguments: Any, norm_epsilon: float | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        del self.rotary_pos_emb  # the model has one for all layers
        if norm_epsilon is not None:
            norms = [self.kv_layernorm, *([self.q_layernorm] if self.config.q_lora_rank is not None else [])]
            for norm in norms:
                norm.eps = norm_epsilon

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        parts = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {part: getattr(submodules, part) for part in parts}

    def _rotated(self, hidden_states: torch.Tensor, rotations: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As in the base class, with g = n.

        ``rotations`` leave the first ``qk_head_dim`` numbers of a head unchanged. The other numbers of a key are shared
        by all heads.
        """
        config, heads = self.config, self.num_attention_heads_per_partition
        queries, latent = self._qkv_down_projection(hidden_states)
        latent, shared_key = latent.split([config.kv_lora_rank, config.qk_pos_emb_head_dim], dim=-1)
        if config.sequence_parallel:
            shared_key = gather_from_sequence_parallel_region(shared_key, group=self.pg_collection.tp)
        if config.q_lora_rank is None:
            query = self.linear_q_proj(queries)[0]
        else:
            query = self.linear_q_up_proj(self.q_layernorm(queries))[0]
        keys_and_values = self.linear_kv_up_proj(self.kv_layernorm(latent))[0].unflatten(-1, (heads, -1))
        key, value = keys_and_values.split([config.qk_head_dim, config.v_head_dim], dim=-1)
        query = rotate_pairs(query.unflatten(-1, (heads, -1)), rotations)
        shared_key = rotate_pairs(shared_key[:, :, None], rotations[..., config.qk_head_dim // 2 :])
        return query, torch.cat([key, shared_key.expand(-1, -1, heads, -1)], dim=-1), value


class FusedMultiLatentAttention(MultiLatentAttention, FusedMLASelfAttention):
    """Computes both down-projections as one matrix product. Checkpoints hold two, as without the fusion.

    Megatron splits the fused projection over tensor ranks. Here it is replicated, like the two it replaces.
    """

    def _qkv_down_projection(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._parts(self.linear_qkv_down_proj(hidden_states)[0], dim=-1)

    def _parts(self, combined: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Split into the part of queries and that of keys and values."""
        config = self.config
        return combined.split([config.q_lora_rank, config.kv_lora_rank + config.qk_pos_emb_head_dim], dim=dim)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        state = MLASelfAttention.sharded_state_dict(self, prefix, sharded_offsets, metadata)
        whole = state[f"{prefix}linear_qkv_down_proj.weight"]

        @torch.no_grad()
        def build(key: str, weight: torch.Tensor, replica_id: ReplicaId, flattened_range: None) -> list[ShardedTensor]:
            return [
                ShardedTensor.from_rank_offsets(
                    key.replace("linear_qkv_down_proj", name),
                    part,
                    *sharded_offsets,
                    replica_id=replica_id,
                    prepend_axis_num=len(sharded_offsets),
                )
                for name, part in zip(
                    ("linear_q_down_proj", "linear_kv_down_proj"), self._parts(weight, dim=0), strict=True
                )
            ]

        state[f"{prefix}linear_qkv_down_proj.weight"] = ShardedTensorFactory(
            whole.key, whole.data, build, torch.cat, replica_id=whole.replica_id
        )
        return state
