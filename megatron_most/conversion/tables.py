"""The weight table of each foreign format. docs/conversion.md explains how to read and add one."""

from __future__ import annotations

from typing import Any

from megatron_most.config import RunConfig
from megatron_most.conversion.native import EMBEDDING, HEAD, ROUTER
from megatron_most.conversion.weight_map import Rule

LAYER = "decoder.layers.{layer}"
FOREIGN_LAYER = "model.layers.{layer}"


def _mlp(native: str, foreign: str, layers: str, **options: Any) -> tuple[Rule, Rule]:
    """A gated MLP: one matrix with the gate above the up projection, and the down projection."""
    return (
        Rule(f"{native}.linear_fc1.weight", (f"{foreign}.gate_proj.weight", f"{foreign}.up_proj.weight"), layers,
             **{name: value for name, value in options.items() if name != "scale"}),
        Rule(f"{native}.linear_fc2.weight", (f"{foreign}.down_proj.weight",), layers, **options),
    )  # fmt: skip


def _compresses_queries(config: RunConfig) -> bool:
    return config.model.attention.q_lora_rank is not None


def _has_shared_experts(config: RunConfig) -> bool:
    return config.model.moe.moe_shared_expert_intermediate_size > 0


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
    return 0.5 if _has_shared_experts(config) else 1.0


_ENDS = (
    Rule(EMBEDDING, ("model.embed_tokens.weight",), layers="none", along="ids"),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), layers="none"),
)
HEAD_RULE = Rule(HEAD, ("lm_head.weight",), layers="none", along="ids")
TIED_HEAD_RULE = Rule(HEAD, ("model.embed_tokens.weight",), layers="none", along="ids")

_NORMS = (
    Rule(f"{LAYER}.input_layernorm.weight", (f"{FOREIGN_LAYER}.input_layernorm.weight",)),
    Rule(f"{LAYER}.pre_mlp_layernorm.weight", (f"{FOREIGN_LAYER}.post_attention_layernorm.weight",)),
)

_ATTENTION, _FOREIGN_ATTENTION = f"{LAYER}.self_attention", f"{FOREIGN_LAYER}.self_attn"

DEEPSEEK_V2 = (
    *_ENDS,
    *_NORMS,
    # Multi-latent attention. Both formats rotate pairs (2i, 2i + 1).
    Rule(f"{_ATTENTION}.linear_q_proj.weight", (f"{_FOREIGN_ATTENTION}.q_proj.weight",),
         when=lambda config: not _compresses_queries(config)),
    Rule(f"{_ATTENTION}.linear_q_down_proj.weight", (f"{_FOREIGN_ATTENTION}.q_a_proj.weight",),
         when=_compresses_queries),
    Rule(f"{_ATTENTION}.q_layernorm.weight", (f"{_FOREIGN_ATTENTION}.q_a_layernorm.weight",),
         when=_compresses_queries),
    Rule(f"{_ATTENTION}.linear_q_up_proj.weight", (f"{_FOREIGN_ATTENTION}.q_b_proj.weight",),
         when=_compresses_queries),
    Rule(f"{_ATTENTION}.linear_kv_down_proj.weight", (f"{_FOREIGN_ATTENTION}.kv_a_proj_with_mqa.weight",)),
    Rule(f"{_ATTENTION}.kv_layernorm.weight", (f"{_FOREIGN_ATTENTION}.kv_a_layernorm.weight",)),
    Rule(f"{_ATTENTION}.linear_kv_up_proj.weight", (f"{_FOREIGN_ATTENTION}.kv_b_proj.weight",)),
    Rule(f"{_ATTENTION}.linear_proj.weight", (f"{_FOREIGN_ATTENTION}.o_proj.weight",)),
    # Experts.
    *_mlp(f"{LAYER}.mlp", f"{FOREIGN_LAYER}.mlp", "dense"),
    Rule(ROUTER, (f"{FOREIGN_LAYER}.mlp.gate.weight",), "moe", along="expert_rows"),
    *_mlp(f"{LAYER}.mlp.shared_experts", f"{FOREIGN_LAYER}.mlp.shared_experts", "moe", when=_has_shared_experts),
    *_mlp(f"{LAYER}.mlp.experts.experts", f"{FOREIGN_LAYER}.mlp.experts.{{expert}}", "moe", along="experts"),
)  # fmt: skip

LLAMA = (
    *_ENDS,
    *_NORMS,
    # Queries, key and value of one query group after another. Both formats rotate halves (i, i + d / 2).
    Rule(f"{_ATTENTION}.linear_qkv.weight",
         tuple(f"{_FOREIGN_ATTENTION}.{name}_proj.weight" for name in "qkv"),
         rounds=_query_groups, parts=_heads_of_a_group),
    Rule(f"{_ATTENTION}.linear_proj.weight", (f"{_FOREIGN_ATTENTION}.o_proj.weight",)),
    # The dense MLP becomes every routed expert and the shared one. Routers have no counterpart.
    *_mlp(f"{LAYER}.mlp", f"{FOREIGN_LAYER}.mlp", "dense"),
    *_mlp(f"{LAYER}.mlp.shared_experts", f"{FOREIGN_LAYER}.mlp", "moe",
          when=_has_shared_experts, scale=upcycled_scale),
    *_mlp(f"{LAYER}.mlp.experts.experts", f"{FOREIGN_LAYER}.mlp", "moe", along="experts", scale=upcycled_scale),
)  # fmt: skip
