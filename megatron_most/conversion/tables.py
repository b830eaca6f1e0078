"""Rules of weight tables: what all foreign formats share, and what they name differently.

docs/conversion.md explains how to read a rule.
"""

from __future__ import annotations

from typing import Any

from megatron_most.config import RunConfig
from megatron_most.conversion.native import EMBEDDING, EXPERT_BIAS, HEAD, ROUTER
from megatron_most.conversion.weight_map import Rule

LAYER = "decoder.layers.{layer}"
FOREIGN_LAYER = "model.layers.{layer}"


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def mlp(
    native: str, foreign: str, layers: str, projections: tuple[str, str, str] = _PROJECTIONS, **options: Any
) -> tuple[Rule, Rule]:
    """A gated MLP: one matrix with the gate above the up projection, and the down projection."""
    gate, up, down = (f"{foreign}.{name}.weight" for name in projections)
    without_scale = {name: value for name, value in options.items() if name != "scale"}
    return (
        Rule(f"{native}.linear_fc1.weight", (gate, up), layers, **without_scale),
        Rule(f"{native}.linear_fc2.weight", (down,), layers, **options),
    )


def _is_latent(config: RunConfig) -> bool:
    return config.model.attention.type == "mla"


def _is_grouped(config: RunConfig) -> bool:
    return config.model.attention.type == "gqa"


def _compresses_queries(config: RunConfig) -> bool:
    return _is_latent(config) and config.model.attention.q_lora_rank is not None


def _has_whole_queries(config: RunConfig) -> bool:
    return _is_latent(config) and config.model.attention.q_lora_rank is None


def has_shared_experts(config: RunConfig) -> bool:
    return config.model.moe.moe_shared_expert_intermediate_size > 0


def _has_head(config: RunConfig) -> bool:
    return not config.model.share_embeddings_and_output_weights


def has_expert_bias(config: RunConfig) -> bool:
    return config.model.moe.moe_router_bias_update_rate > 0


def _has_gate(config: RunConfig) -> bool:
    return config.model.moe.moe_shared_expert_gate


def _has_biases(config: RunConfig) -> bool:
    return config.model.attention.add_qkv_bias


def _has_norms(config: RunConfig) -> bool:
    return config.model.attention.qk_layernorm != "none"


def _query_groups(config: RunConfig) -> int:
    return config.model.attention.num_query_groups


def _heads_of_a_group(config: RunConfig) -> tuple[int, ...]:
    """Rows of the queries, the key and the value of one query group."""
    attention = config.model.attention
    return (
        attention.num_attention_heads // attention.num_query_groups * attention.kv_channels,
        *[attention.kv_channels] * 2,
    )


def upcycled_scale(config: RunConfig) -> float:
    """Factor on the down projections of routed and shared experts after upcycling.

    Both start as the dense MLP, and a token's routed gates sum to 1. With half of the down projection in each, the sum
    of both is the MLP's output.
    """
    return 0.5 if has_shared_experts(config) else 1.0


_NATIVE, _FOREIGN = f"{LAYER}.self_attention", f"{FOREIGN_LAYER}.self_attn"

HEAD_RULE = Rule(HEAD, ("lm_head.weight",), layers="none", along="ids", when=_has_head)
TIED_HEAD_RULE = Rule(HEAD, ("model.embed_tokens.weight",), layers="none", along="ids", when=_has_head)

COMMON = (
    Rule(EMBEDDING, ("model.embed_tokens.weight",), layers="none", along="ids"),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), layers="none"),
    Rule(f"{LAYER}.input_layernorm.weight", (f"{FOREIGN_LAYER}.input_layernorm.weight",)),
    Rule(f"{LAYER}.pre_mlp_layernorm.weight", (f"{FOREIGN_LAYER}.post_attention_layernorm.weight",)),
    Rule(f"{_NATIVE}.linear_proj.weight", (f"{_FOREIGN}.o_proj.weight",)),
    # Multi-latent attention. Both formats rotate pairs (2i, 2i + 1).
    Rule(f"{_NATIVE}.linear_q_proj.weight", (f"{_FOREIGN}.q_proj.weight",), when=_has_whole_queries),
    Rule(f"{_NATIVE}.linear_q_down_proj.weight", (f"{_FOREIGN}.q_a_proj.weight",), when=_compresses_queries),
    Rule(f"{_NATIVE}.q_layernorm.weight", (f"{_FOREIGN}.q_a_layernorm.weight",), when=_compresses_queries),
    Rule(f"{_NATIVE}.linear_q_up_proj.weight", (f"{_FOREIGN}.q_b_proj.weight",), when=_compresses_queries),
    Rule(f"{_NATIVE}.linear_kv_down_proj.weight", (f"{_FOREIGN}.kv_a_proj_with_mqa.weight",), when=_is_latent),
    Rule(f"{_NATIVE}.kv_layernorm.weight", (f"{_FOREIGN}.kv_a_layernorm.weight",), when=_is_latent),
    Rule(f"{_NATIVE}.linear_kv_up_proj.weight", (f"{_FOREIGN}.kv_b_proj.weight",), when=_is_latent),
    # Queries, key and value of one query group after another. Both formats rotate halves (i, i + d / 2).
    Rule(f"{_NATIVE}.linear_qkv.weight", tuple(f"{_FOREIGN}.{name}_proj.weight" for name in "qkv"),
         rounds=_query_groups, parts=_heads_of_a_group, when=_is_grouped),
    Rule(f"{_NATIVE}.linear_qkv.bias", tuple(f"{_FOREIGN}.{name}_proj.bias" for name in "qkv"),
         rounds=_query_groups, parts=_heads_of_a_group, when=_has_biases),
    Rule(f"{_NATIVE}.q_layernorm.weight", (f"{_FOREIGN}.q_norm.weight",), when=_has_norms),
    Rule(f"{_NATIVE}.k_layernorm.weight", (f"{_FOREIGN}.k_norm.weight",), when=_has_norms),
    *mlp(f"{LAYER}.mlp", f"{FOREIGN_LAYER}.mlp", "dense"),
)  # fmt: skip
"""What all formats name alike: everything but routers, routed and shared experts."""


def expert_rules(
    block: str = "mlp",
    projections: tuple[str, str, str] = _PROJECTIONS,
    shared: str = "shared_experts",
) -> tuple[Rule, ...]:
    """The rules of a layer's experts.

    Args:
        block: name of the module that holds router and experts.
        projections: names of an expert's gate, up and down projection.
        shared: name of the shared experts.
    """
    block = f"{FOREIGN_LAYER}.{block}"
    return (
        *mlp(f"{LAYER}.mlp.experts.experts", f"{block}.experts.{{expert}}", "moe", projections, along="experts"),
        *mlp(f"{LAYER}.mlp.shared_experts", f"{block}.{shared}", "moe", when=has_shared_experts),
        Rule(f"{LAYER}.mlp.shared_experts.gate_weight", (f"{block}.shared_expert_gate.weight",), "moe", when=_has_gate),
    )


def router_rule(block: str = "mlp") -> Rule:
    return Rule(ROUTER, (f"{FOREIGN_LAYER}.{block}.gate.weight",), "moe", along="expert_rows")


BIAS_RULE = Rule(
    EXPERT_BIAS,
    (f"{FOREIGN_LAYER}.mlp.gate.e_score_correction_bias",),
    "moe",
    along="expert_entries",
    when=has_expert_bias,
)

UPCYCLED = (
    *mlp(f"{LAYER}.mlp.shared_experts", f"{FOREIGN_LAYER}.mlp", "moe", when=has_shared_experts, scale=upcycled_scale),
    *mlp(f"{LAYER}.mlp.experts.experts", f"{FOREIGN_LAYER}.mlp", "moe", along="experts", scale=upcycled_scale),
)
"""The dense MLP becomes every routed expert and the shared one. Routers have no counterpart."""
