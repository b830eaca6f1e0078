"""DeepSeek-V2 and V3 (Moonlight): multi-latent attention, and many small experts beside shared ones."""

from __future__ import annotations

from typing import Any

from megatron_most.config import RunConfig
from megatron_most.conversion.architecture import ABSENT, ForeignModel, Target, require
from megatron_most.conversion.config_json import Config, Field, Values
from megatron_most.conversion.kinds import MixtureOfExperts
from megatron_most.conversion.tables import BIAS_RULE

_LIMITED = "group_limited_greedy"
_LATENT_EPSILON = 1e-6  # of transformers, whatever rms_norm_eps is


def _latent_epsilon(config: Config) -> float | None:
    return None if config.number("rms_norm_eps") == _LATENT_EPSILON else _LATENT_EPSILON


def _shared_width(config: Config) -> int:
    return config.integer("moe_intermediate_size") * config.integer("n_shared_experts")


class DeepSeekV2(MixtureOfExperts):
    name = "deepseek-v2"
    model_types = ("deepseek_v2",)
    transformers_class = "DeepseekV2"
    fields: tuple[Field, ...] = (
        Field("q_lora_rank", "attention.q_lora_rank", nullable=True),
        Field("kv_lora_rank", "attention.kv_lora_rank"),
        Field("qk_nope_head_dim", "attention.qk_head_dim"),
        Field("qk_rope_head_dim", "attention.qk_pos_emb_head_dim"),
        Field("v_head_dim", "attention.v_head_dim"),
        Field("first_k_dense_replace", "first_k_dense_replace"),
        Field("moe_intermediate_size", "moe.moe_ffn_hidden_size"),
        Field("routed_scaling_factor", "moe.moe_router_topk_scaling_factor", float),
    )
    derived = {
        "attention.latent_layernorm_epsilon": _latent_epsilon,
        "moe.moe_shared_expert_intermediate_size": _shared_width,
    }
    has: Values = {
        "attention": {"type": "mla"},
        "moe": {"moe_router_score_function": "softmax", "norm_topk_prob": False},
    }
    fixed = {
        "attention_bias": (False, None),
        "moe_layer_freq": (1, None),
        "rope_interleave": (True, None),
        "scoring_func": ("softmax",),
        # Implementations disagree on its meaning, alone and with a scaling factor; no published model sets it.
        "norm_topk_prob": (False, None),
    }
    # Sizes that follow from others, and how it was trained.
    absent = {**ABSENT, "first_k_dense_replace": 0, "routed_scaling_factor": 1.0, "n_shared_experts": 0}
    inert = frozenset({"num_key_value_heads", "head_dim", "qk_head_dim", "aux_loss_alpha", "seq_aux", "ep_size"})

    def read_routing(self, config: Config) -> dict[str, Any]:
        config.require("topk_method", "greedy", _LIMITED, None)
        limits = {name: config.get(name) for name in ("n_group", "topk_group")}
        if config.get("topk_method") != _LIMITED:
            return super().read_routing(config)
        return {**super().read_routing(config), **{name: config.integer(name) for name in limits}}

    def write_routing(self, num_experts: int, top_k: int, n_group: int, topk_group: int) -> Values:
        limits: Values = {"topk_method": "greedy", "n_group": None, "topk_group": None}
        if n_group > 1:
            limits = {"topk_method": _LIMITED, "n_group": n_group, "topk_group": topk_group}
        return {**super().write_routing(num_experts, top_k, n_group, topk_group), **limits}

    def write(self, config: RunConfig, foreign: ForeignModel) -> Values:
        moe = config.model.moe
        return {
            **super().write(config, foreign),
            "num_key_value_heads": config.model.attention.num_attention_heads,
            "n_shared_experts": moe.moe_shared_expert_intermediate_size // moe.moe_ffn_hidden_size,
            "seq_aux": moe.moe_router_load_balancing_type == "seq_aux_loss",
            "aux_loss_alpha": moe.moe_aux_loss_coeff,
        }

    def target(self, config: RunConfig, experts: str, record: dict[str, Any] | None) -> Target:
        self.require_shared_experts(config)
        return super().target(config, experts, record)

    def require_shared_experts(self, config: RunConfig) -> None:
        width = config.model.moe.moe_shared_expert_intermediate_size
        require({"model.moe.moe_shared_expert_intermediate_size": (width > 0, "the format has shared experts")})

    def limits_of(self, record: dict[str, Any]) -> tuple[int, int]:
        source = record["source_config"]
        return (source["n_group"], source["topk_group"]) if source.get("topk_method") == _LIMITED else (1, 1)


class DeepSeekV3(DeepSeekV2):
    """Sigmoid scores, expert biases, group limits by the best two experts of a group."""

    name = "deepseek-v3"
    model_types = ("deepseek_v3",)
    transformers_class = "DeepseekV3"
    fields = (*DeepSeekV2.fields, Field("norm_topk_prob", "moe.norm_topk_prob", bool, True))
    has = {
        "attention": {"type": "mla"},
        "moe": {"moe_router_score_function": "sigmoid", "moe_router_bias_update_rate": 1e-3},
    }
    free = (*DeepSeekV2.free, "moe.moe_router_bias_update_rate")
    fixed = {
        **{name: allowed for name, allowed in DeepSeekV2.fixed.items() if name != "norm_topk_prob"},
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc", None),
    }
    inert = DeepSeekV2.inert | {"num_nextn_predict_layers", "num_mtp_layers"}
    absent = {
        **ABSENT,
        "max_position_embeddings": 4096,
        "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5,
        "n_shared_experts": 1,
    }
    has_expert_bias = True
    rules = (*DeepSeekV2.rules, BIAS_RULE)

    def read_routing(self, config: Config) -> dict[str, Any]:
        limits = {name: config.integer(name) for name in ("n_group", "topk_group")}
        return {**MixtureOfExperts.read_routing(self, config), **limits}

    def write_routing(self, num_experts: int, top_k: int, n_group: int, topk_group: int) -> Values:
        limits = {"topk_method": "noaux_tc", "n_group": n_group, "topk_group": topk_group}
        return {**super().write_routing(num_experts, top_k, n_group, topk_group), **limits}

    def write(self, config: RunConfig, foreign: ForeignModel) -> Values:
        return {**super().write(config, foreign), "num_nextn_predict_layers": 0}

    def limits_of(self, record: dict[str, Any]) -> tuple[int, int]:
        return record["source_config"]["n_group"], record["source_config"]["topk_group"]

    def reason_unused(self, name: str, foreign: ForeignModel) -> str | None:
        """Layers after the last one predict further tokens (arXiv 2412.19437, section 2.2)."""
        layer = name.removeprefix("model.layers.").partition(".")[0]
        if name.startswith("model.layers.") and layer.isdecimal() and int(layer) >= foreign.model["num_layers"]:
            return "predicts further tokens, which is not converted"
        return super().reason_unused(name, foreign)
