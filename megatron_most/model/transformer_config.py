"""Translates the run configuration into Megatron-Core's ``TransformerConfig``."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.fused_a2a import HYBRIDEP_TOKEN_ALIGNMENT
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_most import platform
from megatron_most.config import ParallelConfig, RunConfig
from megatron_most.config.attention import AttentionConfig
from megatron_most.model.rotary import softmax_scale
from megatron_most.precision import fp8_backend

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def transformer_config(config: RunConfig, for_inference: bool = False) -> TransformerConfig:
    """Megatron's configuration of the transformer.

    Args:
        for_inference: no sequence parallelism, which cannot split the single position of a generation step.
    """
    model, attention = config.model, config.model.attention
    config_class = MLATransformerConfig if attention.type == "mla" else TransformerConfig
    return config_class(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=attention.num_attention_heads,
        normalization="RMSNorm",
        layernorm_epsilon=model.layernorm_epsilon,
        init_method_std=model.init_method_std,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        apply_rope_fusion=False,
        **(_multi_latent(attention) if attention.type == "mla" else _grouped_query(attention)),
        **_experts(config),
        **_dispatcher(config),
        **_parallel(config.parallel, for_inference),
        **_numerics(config),
        **_recompute(config.training.recompute),
        # No CUDA graphs of modules. Megatron's default, "full", is deprecated.
        cuda_graph_modules=[],
        **_transformer_engine_fp8(config),
    )


def _experts(config: RunConfig) -> dict[str, Any]:
    """Megatron's options of the experts. Our router reads its own options and adds its own losses."""
    model, moe = config.model, config.model.moe
    return {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.max_top_k,
        "moe_ffn_hidden_size": moe.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": moe.moe_shared_expert_intermediate_size or None,
        "moe_shared_expert_gate": moe.moe_shared_expert_gate,
        "moe_layer_freq": [int(layer >= model.first_k_dense_replace) for layer in range(model.num_layers)],
        "moe_router_pre_softmax": True,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_shared_expert_overlap": moe.moe_shared_expert_overlap,
        "moe_permute_fusion": _fuses_permutation(config),
    }


def _parallel(parallel: ParallelConfig, for_inference: bool) -> dict[str, Any]:
    virtual = parallel.virtual_pipeline_model_parallel_size
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": virtual,
        "context_parallel_size": parallel.context_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
        "sequence_parallel": parallel.tensor_model_parallel_size > 1 and not for_inference,
        # Batched point-to-point communication silently gives wrong results with virtual stages on two pipeline ranks
        # (0.19.2).
        "overlap_p2p_comm": virtual is not None,
        "batch_p2p_comm": virtual is None,
    }


def _numerics(config: RunConfig) -> dict[str, Any]:
    dtype = DTYPES[config.precision.dtype]
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": config.precision.dtype == "bf16",
        # Megatron divides the summed gradients by the number of targets of all micro-batches and ranks.
        "calculate_per_token_loss": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        # SwiGLU as one compiled kernel, on GPUs in bf16. CPUs compile nothing, and fp32 keeps torch's own operators.
        "bias_activation_fusion": dtype == torch.bfloat16 and platform.device().type == "cuda",
        "bias_dropout_fusion": False,
    }


def _transformer_engine_fp8(config: RunConfig) -> dict[str, Any]:
    """The FP8 options of Transformer Engine's modules; empty if another backend computes FP8."""
    precision = config.precision
    if not precision.uses_fp8 or fp8_backend(config) != "transformer_engine":
        return {}
    return {
        "fp8": precision.fp8,
        "fp8_recipe": precision.fp8_recipe,
        "fp8_amax_history_len": precision.fp8_amax_history_len,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": bool(precision.num_layers_at_start_in_bf16 or precision.num_layers_at_end_in_bf16),
        "num_layers_at_start_in_bf16": precision.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": precision.num_layers_at_end_in_bf16,
    }


def _fuses_permutation(config: RunConfig) -> bool:
    """``model.moe.moe_permute_fusion``; if null, whether the model uses Transformer Engine and ``alltoall``."""
    moe = config.model.moe
    if moe.moe_permute_fusion is not None:
        return moe.moe_permute_fusion
    is_engine = config.model.transformer_impl != "portable" and platform.model_backend("auto") == "transformer_engine"
    return is_engine and moe.moe_token_dispatcher_type == "alltoall"


def _dispatcher(config: RunConfig) -> dict[str, Any]:
    name = config.model.moe.moe_token_dispatcher_type
    if name == "deepep":
        # A capacity factor makes Megatron mark unused top-k entries, which padding and modalities with a smaller top-k
        # have. It drops no tokens: Megatron's router would do that, and ours does not.
        return {
            "moe_token_dispatcher_type": "flex",
            "moe_flex_dispatcher_backend": name,
            "moe_expert_capacity_factor": 1.0,
        }
    if name == "hybridep":
        # HybridEP needs a multiple of its token alignment. Padding to one costs a reduction and a synchronization with
        # the device in every layer, so enable it only where needed.
        positions = config.positions_per_rank
        return {
            "moe_token_dispatcher_type": "flex",
            "moe_flex_dispatcher_backend": name,
            "moe_hybridep_pad_uneven_dispatch_inputs": positions % HYBRIDEP_TOKEN_ALIGNMENT != 0,
        }
    return {"moe_token_dispatcher_type": name}


def _multi_latent(attention: AttentionConfig) -> dict[str, Any]:
    rope = attention.rope
    return {
        "multi_latent_attention": True,
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_head_dim": attention.qk_head_dim,
        "qk_pos_emb_head_dim": attention.qk_pos_emb_head_dim,
        "v_head_dim": attention.v_head_dim,
        "qk_layernorm": True,
        "mla_down_proj_fusion": attention.mla_down_proj_fusion,
        "rope_type": rope.rope_type,
        "rotary_base": rope.rotary_base,
        # Megatron scales the logits by YaRN's mscale for every rope type; a factor of 1 has no effect.
        "rotary_scaling_factor": rope.rotary_scaling_factor if rope.rope_type == "yarn" else 1.0,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "mscale": rope.mscale,
        "mscale_all_dim": rope.mscale_all_dim,
    }


def _grouped_query(attention: AttentionConfig) -> dict[str, Any]:
    """Without the rotary embedding, which model/rotary.py computes."""
    return {
        "num_query_groups": attention.num_query_groups,
        "kv_channels": attention.kv_channels,
        "add_qkv_bias": attention.add_qkv_bias,
        "qk_layernorm": attention.qk_layernorm == "head",  # our module makes those of all heads
        "softmax_scale": softmax_scale(attention),
    }


def _recompute(mode: str) -> dict[str, Any]:
    if mode == "moe":
        return {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    if mode == "moe_act":  # which Megatron accepts only with moe_grouped_gemm, whatever module computes the experts
        return {"recompute_granularity": "selective", "recompute_modules": ["moe_act"], "moe_grouped_gemm": True}
    if mode == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {}
