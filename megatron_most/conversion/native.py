"""The tensors of a native checkpoint and their shapes, derived from the configuration without building a model.

Shape letters: h hidden size, f width of an expert, E experts, M modalities, V ids (padded), K codes (padded).
"""

from __future__ import annotations

from megatron_most.config import RunConfig
from megatron_most.model.most_model import padded

Shapes = dict[str, tuple[int, ...]]

EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"
CODEBOOK_EMBEDDING = "codebook_embeddings.tables.{codebook}.weight"
CODEBOOK_HEAD = "codebook_heads.heads.{codebook}.weight"
ROUTER = "decoder.layers.{layer}.mlp.router.weight"
EXPERT_BIAS = "decoder.layers.{layer}.mlp.router.expert_bias.values"


def is_expert_bias(key: str) -> bool:
    return key.endswith(EXPERT_BIAS.rpartition("{layer}")[2])


def native_shapes(config: RunConfig) -> Shapes:
    """Key -> shape of every weight, in the order of the model's forward pass; experts ``[E, ...]`` in logical order."""
    vocab, hidden = config.vocab, config.model.hidden_size
    table = (padded(vocab.size), hidden)
    codebooks = range(vocab.num_codebooks if vocab.codec_layout.uses_side_codes else 0)
    codes = (padded(vocab.codebook_size), hidden)
    shapes: Shapes = {EMBEDDING: table}
    shapes |= {CODEBOOK_EMBEDDING.format(codebook=codebook): codes for codebook in codebooks}
    for layer in range(config.model.num_layers):
        shapes |= {f"decoder.layers.{layer}.{name}": shape for name, shape in _layer_shapes(config, layer).items()}
    shapes |= {"decoder.final_layernorm.weight": (hidden,)}
    if not config.model.share_embeddings_and_output_weights:
        shapes[HEAD] = table
    shapes |= {CODEBOOK_HEAD.format(codebook=codebook): codes for codebook in codebooks}
    return shapes


def _layer_shapes(config: RunConfig, layer: int) -> Shapes:
    model, moe, hidden = config.model, config.model.moe, config.model.hidden_size
    norm = (hidden,)
    shapes: Shapes = {"input_layernorm.weight": norm, **_attention_shapes(config), "pre_mlp_layernorm.weight": norm}
    if layer < model.first_k_dense_replace:
        return {**shapes, **_mlp_shapes("mlp", model.ffn_hidden_size, hidden)}
    router = (moe.num_experts, hidden)
    shapes["mlp.router.weight"] = (len(moe.groups), *router) if moe.router_weights == "per_modality" else router
    if moe.moe_router_bias_update_rate > 0:
        shapes["mlp.router.expert_bias.values"] = (len(moe.groups), moe.num_experts)
    if moe.moe_shared_expert_intermediate_size:
        shapes |= _mlp_shapes("mlp.shared_experts", moe.moe_shared_expert_intermediate_size, hidden)
    if moe.moe_shared_expert_gate:
        shapes["mlp.shared_experts.gate_weight"] = (1, hidden)
    experts = _mlp_shapes("mlp.experts.experts", moe.moe_ffn_hidden_size, hidden)
    return shapes | {name: (moe.num_experts, *shape) for name, shape in experts.items()}


def _mlp_shapes(name: str, width: int, hidden: int) -> Shapes:
    return {f"{name}.linear_fc1.weight": (2 * width, hidden), f"{name}.linear_fc2.weight": (hidden, width)}


def _attention_shapes(config: RunConfig) -> Shapes:
    attention, hidden = config.model.attention, config.model.hidden_size
    heads = attention.num_attention_heads
    shapes: Shapes
    if attention.type == "gqa":
        size, groups = attention.kv_channels, attention.num_query_groups
        shapes = {"linear_qkv.weight": ((heads + 2 * groups) * size, hidden)}
        if attention.add_qkv_bias:
            shapes["linear_qkv.bias"] = ((heads + 2 * groups) * size,)
        if attention.qk_layernorm != "none":
            all_heads = attention.qk_layernorm == "all_heads"
            shapes["q_layernorm.weight"] = (heads * size if all_heads else size,)
            shapes["k_layernorm.weight"] = (groups * size if all_heads else size,)
        shapes["linear_proj.weight"] = (hidden, heads * size)
    else:
        query = heads * (attention.qk_head_dim + attention.qk_pos_emb_head_dim)
        latent, rank = attention.kv_lora_rank, attention.q_lora_rank
        if rank is None:
            shapes = {"linear_q_proj.weight": (query, hidden)}
        else:
            shapes = {
                "linear_q_down_proj.weight": (rank, hidden),
                "q_layernorm.weight": (rank,),
                "linear_q_up_proj.weight": (query, rank),
            }
        shapes |= {
            "linear_kv_down_proj.weight": (latent + attention.qk_pos_emb_head_dim, hidden),
            "kv_layernorm.weight": (latent,),
            "linear_kv_up_proj.weight": (heads * (attention.qk_head_dim + attention.v_head_dim), latent),
            "linear_proj.weight": (hidden, heads * attention.v_head_dim),
        }
    return {f"self_attention.{name}": shape for name, shape in shapes.items()}
