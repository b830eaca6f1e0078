"""Layer specs: the only place that decides which modules make up a layer."""

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
from megatron_most.config.model import ModelConfig
from megatron_most.model.attention import FusedMultiLatentAttention, GroupedQueryAttention, MultiLatentAttention
from megatron_most.model.core_attention import PortableCoreAttention
from megatron_most.model.norm import RMSNorm
from megatron_most.moe import (
    ExpertGroups,
    GroupedExperts,
    ModalityAwareMoELayer,
    ModalityAwareRouter,
    SequentialExperts,
    TransformerEngineExperts,
)


def block_spec(
    config: TransformerConfig, model: ModelConfig, backend: str, packing: bool, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage.

    Args:
        backend: ``portable``, modules that need only torch, on CPU and GPU, or ``transformer_engine``. Checkpoint keys
            are the same: norms are separate modules, not fused into linear layers.
        packing: rows hold several documents.
    """
    parts, moe = _PARTS[backend], model.moe
    groups = ExpertGroups.from_config(moe, config.expert_model_parallel_size)
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage
    )
    for layer in spec.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = parts.norm
        # Megatron's map would rename the norms to the linear layers that Transformer Engine fuses them into.
        layer.submodules.sharded_state_dict_keys_map = {}
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = _core_attention(config, parts, packing)
        attention.linear_proj = parts.row
        if config.multi_latent_attention:
            fused = config.mla_down_proj_fusion
            layer.submodules.self_attention.module = FusedMultiLatentAttention if fused else MultiLatentAttention
            layer.submodules.self_attention.params["norm_epsilon"] = model.attention.latent_layernorm_epsilon
            _complete_multi_latent(attention, parts)
        else:
            layer.submodules.self_attention.module = GroupedQueryAttention
            layer.submodules.self_attention.params["norms_all_heads"] = model.attention.qk_layernorm == "all_heads"
            attention.linear_qkv = parts.column
            if config.qk_layernorm:
                attention.q_layernorm = attention.k_layernorm = parts.norm
        # Megatron's spec of the feed-forward part is a partial call with the class and its submodules.
        mlp = layer.submodules.mlp
        submodules = mlp.keywords["submodules"]
        if mlp.func is MoELayer:
            layer.submodules.mlp = functools.partial(ModalityAwareMoELayer, submodules=submodules)
            submodules.router = functools.partial(ModalityAwareRouter, moe=moe, groups=groups)
            submodules.experts = experts_spec(moe, groups)
            _complete_mlp(submodules.shared_experts.keywords["submodules"], parts)
        else:
            _complete_mlp(submodules, parts)
    spec.layer_norm = parts.norm
    return spec


@dataclass(frozen=True)
class _Parts:
    """The modules of a backend: norm, core attention; column-parallel, row-parallel and replicated linear layers."""

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
    """The backend's core attention, except for packed rows with head sizes above 128: there, the portable one.

    Transformer Engine computes wrong gradients in that case. With the head size of DeepSeek-V2-Lite (192), on an H100
    with Transformer Engine 2.11 and cuDNN 9.14, outputs are right, but gradients of queries are off by 57%. The same
    happens in Megatron's own attention. tests/gpu/test_transformer_engine.py compares both.
    """
    latent = config.multi_latent_attention
    size = config.qk_head_dim + config.qk_pos_emb_head_dim if latent else config.kv_channels
    return PortableCoreAttention if packing and size > _LARGEST_PACKED_HEAD else parts.core_attention


def experts_spec(moe: MoEConfig, groups: ExpertGroups) -> Callable[..., torch.nn.Module]:
    """The builder of a layer's routed experts. Checkpoints do not depend on ``moe.expert_backend``."""
    if moe.expert_backend == "grouped":
        return functools.partial(GroupedExperts, groups=groups)
    module, linear_fc1, linear_fc2 = {
        "sequential": (SequentialExperts, ColumnParallelLinear, RowParallelLinear),
        "transformer_engine": (
            TransformerEngineExperts,
            transformer_engine.TEColumnParallelGroupedLinear,
            transformer_engine.TERowParallelGroupedLinear,
        ),
    }[moe.expert_backend]
    submodules = MLPSubmodules(linear_fc1=linear_fc1, linear_fc2=linear_fc2)
    return functools.partial(module, submodules=submodules, groups=groups)


def _complete_multi_latent(attention: MLASelfAttentionSubmodules, parts: _Parts) -> None:
    """Set all projections and norms; the module builds those that its configuration needs."""
    attention.q_layernorm = attention.kv_layernorm = parts.norm
    attention.linear_q_proj = attention.linear_q_up_proj = attention.linear_kv_up_proj = parts.column
    # Megatron's default, column-parallel, gives wrong gradients under tensor parallelism (0.19.2).
    attention.linear_q_down_proj = attention.linear_kv_down_proj = parts.replicated
    attention.linear_qkv_down_proj = parts.replicated


def _complete_mlp(mlp: MLPSubmodules, parts: _Parts) -> None:
    mlp.linear_fc1, mlp.linear_fc2 = parts.column, parts.row
