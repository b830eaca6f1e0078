"""Which module stands where in a layer: the only place where parts are swapped."""

from __future__ import annotations

import functools

from megatron.core.extensions import transformer_engine
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_latent_attention import Linear, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_most.config import MoEConfig
from megatron_most.model.core_attention import PortableCoreAttention
from megatron_most.model.norm import RMSNorm
from megatron_most.moe import GroupedExperts, ModalityAwareRouter, SequentialExperts, TransformerEngineExperts


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
            layer.submodules.mlp.submodules.experts = experts_spec(moe)
    spec.layer_norm = RMSNorm
    return spec


def experts_spec(moe: MoEConfig) -> ModuleSpec:
    """The routed experts of a layer. Checkpoints are the same whichever module computes them."""
    module, linear_fc1, linear_fc2 = {
        "grouped": (GroupedExperts, None, None),
        "sequential": (SequentialExperts, ColumnParallelLinear, RowParallelLinear),
        "transformer_engine": (
            TransformerEngineExperts,
            transformer_engine.TEColumnParallelGroupedLinear,
            transformer_engine.TERowParallelGroupedLinear,
        ),
    }[moe.expert_backend]
    submodules = MLPSubmodules(linear_fc1=linear_fc1, linear_fc2=linear_fc2) if linear_fc1 else None
    return ModuleSpec(module=module, submodules=submodules, params={"moe": moe})


def _complete_multi_latent(attention: MLASelfAttentionSubmodules, has_query_compression: bool) -> None:
    attention.kv_layernorm = RMSNorm
    # Column-parallel by default, which gives wrong gradients under tensor parallelism (0.16.1); replicated instead.
    attention.linear_kv_down_proj = Linear
    if has_query_compression:
        attention.q_layernorm = RMSNorm
        attention.linear_q_down_proj = Linear
