"""Which module stands where in a layer: the only place where parts are swapped."""

from __future__ import annotations

import functools

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_latent_attention import Linear, MLASelfAttentionSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_most.config import MoEConfig
from megatron_most.model.core_attention import PortableCoreAttention
from megatron_most.model.norm import RMSNorm
from megatron_most.moe import ModalityAwareRouter


def portable_block_spec(
    config: TransformerConfig, moe: MoEConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Layers of one pipeline stage from parts that need nothing but torch, on CPU and GPU alike."""
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage
    )
    for layer in spec.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        # Checkpoints name each norm by its own module, not by the linear layer that another spec would fuse it with.
        layer.submodules.sharded_state_dict_keys_map = {}
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = PortableCoreAttention
        if config.multi_latent_attention:
            _complete_multi_latent(attention, has_query_compression=config.q_lora_rank is not None)
        if layer.submodules.mlp.module is MoELayer:
            layer.submodules.mlp.submodules.router = functools.partial(ModalityAwareRouter, moe=moe)
    spec.layer_norm = RMSNorm
    return spec


def _complete_multi_latent(attention: MLASelfAttentionSubmodules, has_query_compression: bool) -> None:
    attention.kv_layernorm = RMSNorm
    # Column-parallel by default, which gives wrong gradients under tensor parallelism (0.16.1); replicated instead.
    attention.linear_kv_down_proj = Linear
    if has_query_compression:
        attention.q_layernorm = RMSNorm
        attention.linear_q_down_proj = Linear
