"""Builds this rank's model chunks from the configuration, and counts the parameters of a configuration."""

from __future__ import annotations

from megatron.core import parallel_state

from megatron_most import platform
from megatron_most.config import RunConfig
from megatron_most.config.attention import AttentionConfig
from megatron_most.model.fp8 import convert_to_fp8
from megatron_most.model.most_model import MoSTModel, padded
from megatron_most.model.rotary import Rotations
from megatron_most.model.specs import block_spec
from megatron_most.model.transformer_config import transformer_config
from megatron_most.moe import ExpertGroups
from megatron_most.precision import check_fp8, fp8_backend


def check_libraries(config: RunConfig) -> None:
    """Raise :class:`ConfigError` if the model needs a library that is not installed. Allocates nothing."""
    platform.model_backend(config.model.transformer_impl)
    check_fp8(config)
    moe = config.model.moe
    if moe.expert_backend == "transformer_engine":
        platform.require_library("Transformer Engine", "model.moe.expert_backend", moe.expert_backend)
    if moe.moe_permute_fusion:
        platform.require_library("Transformer Engine", "model.moe.moe_permute_fusion", moe.moe_permute_fusion)
    if moe.moe_router_fusion:
        platform.require_library("Triton", "model.moe.moe_router_fusion", moe.moe_router_fusion)
    if moe.moe_token_dispatcher_type in ("deepep", "hybridep"):
        library = {"deepep": "DeepEP", "hybridep": "HybridEP"}[moe.moe_token_dispatcher_type]
        platform.require_library(library, "model.moe.moe_token_dispatcher_type", moe.moe_token_dispatcher_type)


def build_model(config: RunConfig, for_inference: bool = False) -> list[MoSTModel]:
    """This rank's model chunks, one for each virtual pipeline stage, on its device and not wrapped.

    Call :func:`megatron_most.parallel.initialize` with ``config.parallel`` first.

    Args:
        for_inference: see :func:`~megatron_most.model.transformer_config.transformer_config`.

    Raises:
        ConfigError: a library that the configuration needs is missing.
    """
    check_libraries(config)
    megatron = transformer_config(config, for_inference)
    backend = platform.model_backend(config.model.transformer_impl)
    rotary = Rotations(config.model.attention, config.data.seq_length, parallel_state.get_context_parallel_group())
    num_stages = config.parallel.virtual_pipeline_model_parallel_size
    chunks = []
    for vp_stage in [None] if num_stages is None else range(num_stages):
        chunk = MoSTModel(
            config=megatron,
            transformer_layer_spec=block_spec(megatron, config.model, backend, config.data.packing, vp_stage),
            vocab=config.vocab,
            max_sequence_length=config.data.seq_length,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            rotary=rotary,
            shares_weights=config.model.share_embeddings_and_output_weights,
            vp_stage=vp_stage,
        )
        chunks.append(chunk.to(platform.device()))
    if config.precision.uses_fp8 and fp8_backend(config) != "transformer_engine":
        convert_to_fp8(config, chunks)
    return chunks


def count_parameters(config: RunConfig) -> dict[str, int]:
    """Count the parameters of the whole model without building it.

    Returns:
        ``total``; ``active``, those used for one token: everything dense, the experts of the modality with the largest
        top-k, the embeddings of one id and of one code per codebook, and all heads; ``experts/<pool>`` for each pool of
        experts; ``shared_experts``; and ``embeddings``, input and output, of ids and codes.
    """
    model, moe, vocab = config.model, config.model.moe, config.vocab
    hidden = model.hidden_size
    norms = 2 * hidden
    num_moe_layers = model.num_layers - model.first_k_dense_replace
    expert = 3 * hidden * moe.moe_ffn_hidden_size
    pools = {
        f"experts/{name}": num_moe_layers * len(experts) * expert
        for name, experts in ExpertGroups.from_config(moe).pools.items()
    }
    gate = 1 if moe.moe_shared_expert_gate else 0
    shared = num_moe_layers * hidden * (3 * moe.moe_shared_expert_intermediate_size + gate)
    router = num_moe_layers * moe.num_experts * hidden
    routers = router * (len(moe.groups) if moe.router_weights == "per_modality" else 1)
    dense = model.first_k_dense_replace * 3 * hidden * model.ffn_hidden_size
    trunk = model.num_layers * (_attention_size(hidden, model.attention) + norms) + hidden + shared + routers + dense
    frames = vocab.num_codebooks if vocab.codec_layout.uses_side_codes else 0
    ids, codes = hidden * padded(vocab.size), hidden * frames * padded(vocab.codebook_size)
    tables = (1 if model.share_embeddings_and_output_weights else 2) * ids + 2 * codes
    # All heads, and the embeddings of one id and its codes.
    read = ids + codes + hidden * ((not model.share_embeddings_and_output_weights) + frames)
    active = trunk - routers + router + num_moe_layers * moe.max_top_k * expert + read
    return {
        "total": trunk + sum(pools.values()) + tables,
        "active": active,
        **pools,
        "shared_experts": shared,
        "embeddings": tables,
    }


def _attention_size(hidden: int, attention: AttentionConfig) -> int:
    """Parameters of one layer's attention."""
    heads = attention.num_attention_heads
    if attention.type == "gqa":
        keys = attention.num_query_groups
        biases = (heads + 2 * keys) * attention.kv_channels if attention.add_qkv_bias else 0
        norms = {"none": 0, "head": 2, "all_heads": heads + keys}[attention.qk_layernorm] * attention.kv_channels
        return 2 * hidden * (heads + keys) * attention.kv_channels + biases + norms
    head_dim = attention.qk_head_dim + attention.qk_pos_emb_head_dim
    if attention.q_lora_rank is None:
        query = hidden * heads * head_dim
    else:
        query = attention.q_lora_rank * (hidden + 1 + heads * head_dim)
    return (
        query
        + hidden * (attention.kv_lora_rank + attention.qk_pos_emb_head_dim)
        + attention.kv_lora_rank
        + attention.kv_lora_rank * heads * (attention.qk_head_dim + attention.v_head_dim)
        + heads * attention.v_head_dim * hidden
    )
