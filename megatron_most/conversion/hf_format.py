"""The format ``hf``: a MoST model whole, as :mod:`megatron_most.huggingface` computes it.

Every native tensor has its place among the model's own, so nothing is left for an extension. ``config.json`` says what
the model is by the field's names; under ``run_config`` it keeps the run configuration, from which import rebuilds it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from megatron_most.config import RopeConfig, RunConfig, with_new_names
from megatron_most.config.load import build_config
from megatron_most.conversion.extension import shape_config
from megatron_most.conversion.hugging_face import CONFIG, HuggingFaceModel
from megatron_most.conversion.native import CODEBOOK_EMBEDDING, CODEBOOK_HEAD, EXPERT_BIAS, ROUTER
from megatron_most.conversion.tables import DEEPSEEK_V2, LLAMA
from megatron_most.conversion.weight_map import Correspondence, IdRun, Origin, Rule
from megatron_most.errors import CheckpointError
from megatron_most.model.most_model import padded
from megatron_most.moe import ExpertGroups

NAME = "hf"
MODEL_TYPE = "megatron_most"


def _is_attention(rule: Rule) -> bool:
    return ".self_attention." in rule.native


def _attention_rules(kind: str, rules: Sequence[Rule]) -> list[Rule]:
    """The rules of attention of one kind, for models that have it."""

    def only(rule: Rule) -> Rule:
        return dataclasses.replace(rule, when=lambda config: config.model.attention.type == kind and rule.when(config))

    return [only(rule) for rule in rules if _is_attention(rule)]


RULES = (
    *(rule for rule in DEEPSEEK_V2 if rule.native != ROUTER and not _is_attention(rule)),
    *_attention_rules("mla", DEEPSEEK_V2),
    *_attention_rules("gqa", LLAMA),
    Rule(ROUTER, ("model.layers.{layer}.mlp.gate.weight",), "moe", along="matrices"),
    Rule(
        EXPERT_BIAS,
        ("model.layers.{layer}.mlp.gate.e_score_correction_bias",),
        "moe",
        when=lambda config: config.model.moe.moe_router_bias_update_rate > 0,
    ),
    Rule(CODEBOOK_EMBEDDING, ("model.codebook_embeddings.{codebook}.weight",), "codebooks"),
    Rule(CODEBOOK_HEAD, ("codebook_heads.{codebook}.weight",), "codebooks"),
)


def correspondence(config: RunConfig) -> Correspondence:
    """Experts and ids are the same in both, padding included."""
    model = config.model
    experts = tuple(Origin(expert) for expert in range(model.moe.num_experts))
    size = padded(config.vocab.size)
    return Correspondence((experts,) * (model.num_layers - model.first_k_dense_replace), (IdRun(0, 0, size),))


def model_config(config: RunConfig) -> dict[str, Any]:
    """``config.json`` of the model, without what its tokenizer and codec add."""
    model, moe, vocab = config.model, config.model.moe, config.vocab
    return {
        "architectures": ["MoSTForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        "vocab_size": padded(vocab.size),
        "text_vocab_size": vocab.text_vocab_size,
        "num_codebooks": vocab.num_codebooks,
        "codebook_size": vocab.codebook_size,
        "codebook_vocab_size": padded(vocab.codebook_size),
        "codec_layout": vocab.layout,
        "further_modalities": [dataclasses.asdict(entry) for entry in vocab.further_modalities],
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.attention.num_attention_heads,
        "max_position_embeddings": config.data.seq_length,
        "rms_norm_eps": model.layernorm_epsilon,
        "initializer_range": model.init_method_std,
        **_attention_config(config),
        "rope_parameters": _rope_parameters(model.attention.rope),
        "first_k_dense_replace": model.first_k_dense_replace,
        "n_routed_experts": moe.num_experts,
        "moe_intermediate_size": moe.moe_ffn_hidden_size,
        "shared_expert_intermediate_size": moe.moe_shared_expert_intermediate_size,
        "expert_groups": [
            {
                "modality": group.modality,
                "experts": list(choice),
                "num_experts_per_tok": group.moe_router_topk,
                "n_group": group.moe_router_num_groups,
                "topk_group": group.moe_router_group_topk,
            }
            for group, choice in zip(moe.groups, ExpertGroups.from_config(moe).choices, strict=True)
        ],
        "scoring_func": moe.moe_router_score_function,
        "score_rule": moe.score_rule,
        "norm_topk_prob": moe.norm_topk_prob,
        "routed_scaling_factor": moe.moe_router_topk_scaling_factor,
        "router_weights": moe.router_weights,
        "use_expert_bias": moe.moe_router_bias_update_rate > 0,
        "text_loss_weight": model.text_loss_weight,
        "codebook_loss_weights": list(model.codebook_loss_weights),
        "tie_word_embeddings": False,
        "run_config": {**shape_config(config), "tokenizer": None, "codec": config.codec},
    }


def run_config(source: HuggingFaceModel, overrides: Sequence[str]) -> RunConfig:
    """The run configuration in ``config.json``.

    Raises:
        CheckpointError: there is none, or it is that of another model than the other fields describe.
    """
    path = source.directory / CONFIG
    values = source.config.get("run_config")
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: run_config={values!r}: must be the run configuration that export wrote")
    config = build_config(f"{path}: run_config", with_new_names(values), overrides)
    for name, value in model_config(config).items():
        found = source.config.get(name)
        if name not in ("architectures", "run_config", "max_position_embeddings") and found != value:
            raise CheckpointError(f"{path}: {name}={found!r}: run_config says {value!r}")
    return config


def _attention_config(config: RunConfig) -> dict[str, Any]:
    attention = config.model.attention
    if attention.type == "gqa":
        return {
            "attention_type": "gqa",
            "num_key_value_heads": attention.num_query_groups,
            "head_dim": attention.kv_channels,
        }
    return {
        "attention_type": "mla",
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_head_dim,
        "qk_rope_head_dim": attention.qk_pos_emb_head_dim,
        "v_head_dim": attention.v_head_dim,
    }


def _rope_parameters(rope: RopeConfig) -> dict[str, Any]:
    if rope.rope_type == "rope":
        return {"rope_type": "default", "rope_theta": rope.rotary_base}
    common = {
        "rope_type": rope.rope_type,
        "rope_theta": rope.rotary_base,
        "factor": rope.rotary_scaling_factor,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
    }
    if rope.rope_type == "llama3":
        return {**common, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {
        **common,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "mscale": rope.mscale,
        "mscale_all_dim": rope.mscale_all_dim,
    }
