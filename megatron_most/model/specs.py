"""Which module stands where in a layer: the only place where parts are swapped."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.extensions import transformer_engine
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_most.config import MoEConfig
from megatron_most.model.attention import FusedMultiLatentAttention, GroupedQueryAttention, MultiLatentAttention
from megatron_most.model.core_attention import PortableCoreAttention
from megatron_most.model.norm import RMSNorm
from megatron_most.moe import (
    GroupedExperts,
    ModalityAwareMoELayer,
    ModalityAwareRouter,
    SequentialExperts,
    TransformerEngineExperts,
)


def block_spec(
    config: TransformerConfig, moe: MoEConfig, backend: str, packing: bool, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Layers of one pipeline stage.

    Args:
        packing: rows hold several documents.
        backend: ``portable``, parts that need nothing but torch, on CPU and GPU alike; or ``transformer_engine``.
            Either names its weights in the same way: norms are modules of their own, fused with no linear layer.
    """
    parts = _PARTS[backend]
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage
    )
    for layer in spec.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = parts.norm
        # Checkpoints name each norm by its own module, not by the linear layer that another spec would fuse it with.
        layer.submodules.sharded_state_dict_keys_map = {}
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = _core_attention(config, parts, packing)
        attention.linear_proj = parts.row
        if config.multi_latent_attention:
            fused = config.mla_down_proj_fusion
            layer.submodules.self_attention.module = FusedMultiLatentAttention if fused else MultiLatentAttention
            _complete_multi_latent(attention, parts)
        else:
            layer.submodules.self_attention.module = GroupedQueryAttention
            attention.linear_qkv = parts.column
        # Megatron names the feed-forward part by a call to be completed: its function and its submodules.
        mlp = layer.submodules.mlp
        submodules = mlp.keywords["submodules"]
        if mlp.func is MoELayer:
            layer.submodules.mlp = functools.partial(ModalityAwareMoELayer, submodules=submodules)
            submodules.router = functools.partial(ModalityAwareRouter, moe=moe)
            submodules.experts = experts_spec(moe)
            _complete_mlp(submodules.shared_experts.keywords["submodules"], parts)
        else:
            _complete_mlp(submodules, parts)
    spec.layer_norm = parts.norm
    return spec


@dataclass(frozen=True)
class _Parts:
    """The modules of a backend: norm, core attention, and linear layers cut by columns, by rows and not at all."""

    norm: type
    core_attention: type
    column: type
    row: type
    replicated: type


_PARTS = {
    "portable": _Parts(RMSNorm, PortableCoreAttention, ColumnParallelLinear, RowParallelLinear, Linear),
    "transformer_engine": _Parts(
        transformer_engine.TENorm,
        transformer_engine.TEDotProductAttention,
        transformer_engine.TEColumnParallelLinear,
        transformer_engine.TERowParallelLinear,
        transformer_engine.TELinear,
    ),
}


_LARGEST_PACKED_HEAD = 128


def _core_attention(config: TransformerConfig, parts: _Parts, packing: bool) -> type:
    """The backend's; but Transformer Engine gets gradients of packed documents wrong where heads are larger than 128.

    Seen on an H100 with Transformer Engine 2.11 and cuDNN 9.14, also through Megatron's own attention: with heads of
    DeepSeek-V2-Lite (192) outputs are right, and gradients of queries 57 % off. tests/gpu/test_transformer_engine.py
    compares both.
    """
    latent = config.multi_latent_attention
    size = config.qk_head_dim + config.qk_pos_emb_head_dim if latent else config.kv_channels
    return PortableCoreAttention if packing and size > _LARGEST_PACKED_HEAD else parts.core_attention


def experts_spec(moe: MoEConfig) -> Callable[..., torch.nn.Module]:
    """What builds the routed experts of a layer. Checkpoints are the same whichever module computes them."""
    module, linear_fc1, linear_fc2 = {
        "grouped": (GroupedExperts, None, None),
        "sequential": (SequentialExperts, ColumnParallelLinear, RowParallelLinear),
        "transformer_engine": (
            TransformerEngineExperts,
            transformer_engine.TEColumnParallelGroupedLinear,
            transformer_engine.TERowParallelGroupedLinear,
        ),
    }[moe.expert_backend]
    if linear_fc1 is None:
        return functools.partial(module, moe=moe)
    return functools.partial(module, submodules=MLPSubmodules(linear_fc1=linear_fc1, linear_fc2=linear_fc2), moe=moe)


def _complete_multi_latent(attention: MLASelfAttentionSubmodules, parts: _Parts) -> None:
    """Of the projections of queries, the module builds those that its configuration has."""
    attention.q_layernorm = attention.kv_layernorm = parts.norm
    attention.linear_q_proj = attention.linear_q_up_proj = attention.linear_kv_up_proj = parts.column
    # Column-parallel by default, which gives wrong gradients under tensor parallelism (0.19.2); replicated instead.
    attention.linear_q_down_proj = attention.linear_kv_down_proj = parts.replicated
    attention.linear_qkv_down_proj = parts.replicated


def _complete_mlp(mlp: MLPSubmodules, parts: _Parts) -> None:
    mlp.linear_fc1, mlp.linear_fc2 = parts.column, parts.row
