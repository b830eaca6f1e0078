"""Our model and run configuration -> Megatron-Core's ``TransformerConfig``."""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.fused_a2a import HYBRIDEP_TOKEN_ALIGNMENT
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_most import platform
from megatron_most.config import RunConfig
from megatron_most.config.attention import AttentionConfig
from megatron_most.model.rotary import softmax_scale
from megatron_most.precision import fp8_backend

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def transformer_config(config: RunConfig) -> TransformerConfig:
    """Megatron's configuration of the transformer, in its own words."""
    model, parallel, training = config.model, config.parallel, config.training
    attention, moe = model.attention, model.moe
    dtype = DTYPES[config.precision.dtype]
    virtual = parallel.virtual_pipeline_model_parallel_size
    config_class, attention_options = (
        (MLATransformerConfig, _multi_latent(attention))
        if attention.type == "mla"
        else (TransformerConfig, _grouped_query(attention))
    )
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
        **attention_options,
        # Experts. The router is ours (model/specs.py); it reads its own options and attaches its own losses.
        num_moe_experts=moe.num_experts,
        moe_router_topk=moe.max_top_k,
        moe_ffn_hidden_size=moe.moe_ffn_hidden_size,
        moe_shared_expert_intermediate_size=moe.moe_shared_expert_intermediate_size or None,
        moe_layer_freq=[0] * model.first_k_dense_replace + [1] * (model.num_layers - model.first_k_dense_replace),
        moe_router_pre_softmax=True,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_shared_expert_overlap=moe.moe_shared_expert_overlap,
        moe_permute_fusion=_fuses_permutation(config),
        **_dispatcher(config),
        # Parallelism.
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        sequence_parallel=parallel.tensor_model_parallel_size > 1,
        # Batched point-to-point messages are silently wrong with virtual stages on two pipeline ranks (0.19.2).
        overlap_p2p_comm=virtual is not None,
        batch_p2p_comm=virtual is None,
        # Numerics.
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=config.precision.dtype == "bf16",
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        # One compiled kernel for SwiGLU forward and one backward; CPUs compile none, and fp32 stays as torch has it.
        bias_activation_fusion=dtype == torch.bfloat16 and platform.device().type == "cuda",
        bias_dropout_fusion=False,
        **_recompute(training.recompute),
        # No module is captured. The default, "full", is a name that Megatron has given up.
        cuda_graph_modules=[],
        **_transformer_engine_fp8(config),
    )


def _transformer_engine_fp8(config: RunConfig) -> dict[str, object]:
    """What Transformer Engine's modules have to know of FP8; nothing where others compute it."""
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
    """As configured; if it is not, where the model's other parts are Transformer Engine's."""
    moe = config.model.moe
    if moe.moe_permute_fusion is not None:
        return moe.moe_permute_fusion
    is_engine = config.model.transformer_impl != "portable" and platform.model_backend("auto") == "transformer_engine"
    return is_engine and moe.moe_token_dispatcher_type == "alltoall"


def _dispatcher(config: RunConfig) -> dict[str, object]:
    name = config.model.moe.moe_token_dispatcher_type
    if name == "deepep":
        # With a capacity factor Megatron tells DeepEP which of a token's top-k places are empty, as padding's are and
        # those of modalities with a smaller top-k; no token is dropped for it, for that would be the router's doing.
        return {
            "moe_token_dispatcher_type": "flex",
            "moe_flex_dispatcher_backend": name,
            "moe_expert_capacity_factor": 1.0,
        }
    if name == "hybridep":
        # Every rank has as many positions, but HybridEP takes whole chunks of them. Megatron fills up what is none,
        # which costs a reduction and makes the host wait for the device, in every layer.
        positions = config.positions_per_rank
        return {
            "moe_token_dispatcher_type": "flex",
            "moe_flex_dispatcher_backend": name,
            "moe_hybridep_pad_uneven_dispatch_inputs": positions % HYBRIDEP_TOKEN_ALIGNMENT != 0,
        }
    return {"moe_token_dispatcher_type": name}


def _multi_latent(attention: AttentionConfig) -> dict[str, object]:
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
        # The attention scales its logits by YaRN's mscale whatever the rope type; a factor of 1 leaves them alone.
        "rotary_scaling_factor": rope.rotary_scaling_factor if rope.rope_type == "yarn" else 1.0,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "mscale": rope.mscale,
        "mscale_all_dim": rope.mscale_all_dim,
    }


def _grouped_query(attention: AttentionConfig) -> dict[str, object]:
    """The rotary embedding is not Megatron's to build: model/rotary.py does."""
    return {
        "num_query_groups": attention.num_query_groups,
        "kv_channels": attention.kv_channels,
        "softmax_scale": softmax_scale(attention),
    }


def _recompute(mode: str) -> dict[str, object]:
    if mode == "moe":
        return {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    if mode == "moe_act":  # which Megatron accepts only with moe_grouped_gemm, whatever module computes the experts
        return {"recompute_granularity": "selective", "recompute_modules": ["moe_act"], "moe_grouped_gemm": True}
    if mode == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {}
