"""Bases with experts and grouped-query attention: Qwen2-MoE, Qwen3-MoE, Mixtral, OLMoE."""

from __future__ import annotations

from megatron_most.config import RunConfig
from megatron_most.conversion.architecture import ABSENT, ForeignModel
from megatron_most.conversion.config_json import Config, Field, Values
from megatron_most.conversion.kinds import EVERY_HEAD_ITS_KEY, GROUPED_QUERY, HEAD_SIZE, MixtureOfExperts, head_size
from megatron_most.conversion.tables import COMMON, expert_rules, router_rule
from megatron_most.errors import CheckpointError

_SOFTMAX: Values = {"moe_router_score_function": "softmax", "moe_router_topk_scaling_factor": 1.0}
_NO_SHARED: Values = {"moe_shared_expert_intermediate_size": 0}
_NORMALIZES = Field("norm_topk_prob", "moe.norm_topk_prob", bool, False)


def _dense_layers(config: Config) -> int:
    layers = config.get("mlp_only_layers") or []
    if not isinstance(layers, list) or layers != list(range(len(layers))):
        raise CheckpointError(f"{config.source}: mlp_only_layers={layers!r}: only the first layers may be dense")
    return len(layers)


class Qwen3MoE(MixtureOfExperts):
    """Norms of single queries and keys; heads apart from the width of the model; no shared experts."""

    name = "qwen3-moe"
    model_types = ("qwen3_moe",)
    transformers_class = "Qwen3Moe"
    num_experts = Field("num_experts", "", also="num_local_experts")
    fields: tuple[Field, ...] = (
        *GROUPED_QUERY,
        HEAD_SIZE,
        Field("moe_intermediate_size", "moe.moe_ffn_hidden_size"),
        _NORMALIZES,
    )
    derived = {"first_k_dense_replace": _dense_layers}
    has: Values = {"attention": {"type": "gqa", "qk_layernorm": "head"}, "moe": {**_SOFTMAX, **_NO_SHARED}}
    fixed = {"attention_bias": (False, None), "decoder_sparse_step": (1, None), "use_sliding_window": (False, None)}
    inert = frozenset({"sliding_window", "max_window_layers"})
    absent = {**ABSENT, "max_position_embeddings": 32768}

    def write(self, config: RunConfig, foreign: ForeignModel) -> Values:
        dense = list(range(config.model.first_k_dense_replace))
        return {**super().write(config, foreign), "mlp_only_layers": dense}


class Qwen2MoE(Qwen3MoE):
    """Biases of the projections of queries, keys and values; a shared expert with a gate."""

    name = "qwen2-moe"
    model_types = ("qwen2_moe",)
    transformers_class = "Qwen2Moe"
    fields = (
        *GROUPED_QUERY,
        Field("moe_intermediate_size", "moe.moe_ffn_hidden_size"),
        Field("shared_expert_intermediate_size", "moe.moe_shared_expert_intermediate_size"),
        Field("qkv_bias", "attention.add_qkv_bias", bool, True),
        _NORMALIZES,
    )
    derived = {**Qwen3MoE.derived, "attention.kv_channels": head_size}
    has: Values = {"attention": {"type": "gqa"}, "moe": {**_SOFTMAX, "moe_shared_expert_gate": True}}
    fixed = {"decoder_sparse_step": (1, None), "use_sliding_window": (False, None)}
    rules = (*COMMON, router_rule(), *expert_rules(shared="shared_expert"))


class Mixtral(MixtureOfExperts):
    """Few wide experts, whose gates sum to 1."""

    name = "mixtral"
    model_types = ("mixtral",)
    transformers_class = "Mixtral"
    num_experts = Field("num_local_experts", "", also="num_experts")
    fields = (*GROUPED_QUERY, HEAD_SIZE, Field("intermediate_size", "moe.moe_ffn_hidden_size"))
    has: Values = {
        "first_k_dense_replace": 0,
        "attention": {"type": "gqa"},
        "moe": {**_SOFTMAX, **_NO_SHARED, "norm_topk_prob": True},
    }
    free = (*MixtureOfExperts.free, "ffn_hidden_size")  # no layer is dense
    fixed = {"sliding_window": (None,)}
    inert = frozenset({"router_jitter_noise"})
    absent = {**ABSENT, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 131072}
    rules = (
        *COMMON,
        router_rule("block_sparse_moe"),
        *expert_rules("block_sparse_moe", projections=("w1", "w3", "w2")),
    )


class OLMoE(MixtureOfExperts):
    """Norms of all queries, and of all keys, of a token together."""

    name = "olmoe"
    model_types = ("olmoe",)
    transformers_class = "Olmoe"
    num_experts = Field("num_experts", "", also="num_local_experts")
    fields = (EVERY_HEAD_ITS_KEY, Field("intermediate_size", "moe.moe_ffn_hidden_size"), _NORMALIZES)
    derived = {"attention.kv_channels": head_size}
    has: Values = {
        "first_k_dense_replace": 0,
        "attention": {"type": "gqa", "qk_layernorm": "all_heads"},
        "moe": {**_SOFTMAX, **_NO_SHARED},
    }
    free = Mixtral.free
    fixed = {"attention_bias": (False, None), "clip_qkv": (None,)}
    absent = {**ABSENT, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
