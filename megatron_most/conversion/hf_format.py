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
from megatron_most.conversion.architecture import Architecture, ForeignModel, Target, read_vocabulary
from megatron_most.conversion.config_json import Config
from megatron_most.conversion.extension import shape_config
from megatron_most.conversion.hugging_face import CONFIG, HuggingFaceModel
from megatron_most.conversion.native import CODEBOOK_EMBEDDING, CODEBOOK_HEAD, EXPERT_BIAS, ROUTER
from megatron_most.conversion.tables import COMMON, expert_rules, has_expert_bias
from megatron_most.conversion.weight_map import Correspondence, IdRun, Origin, Rule
from megatron_most.errors import CheckpointError
from megatron_most.model.most_model import padded
from megatron_most.moe import ExpertGroups
from megatron_most.vocab import VocabLayout

NAME = "hf"
MODEL_TYPE = "megatron_most"


_ADDED = {"shared_expert_gate": False, "qkv_bias": False, "qk_norm": "none"}
"""What a model has whose ``config.json`` was written before the field existed."""

RULES = (
    *COMMON,
    *expert_rules(),
    Rule(ROUTER, ("model.layers.{layer}.mlp.gate.weight",), "moe", along="matrices"),
    Rule(
        EXPERT_BIAS,
        ("model.layers.{layer}.mlp.gate.e_score_correction_bias",),
        "moe",
        along="matrices",
        when=has_expert_bias,
    ),
    Rule(CODEBOOK_EMBEDDING, ("model.codebook_embeddings.{codebook}.weight",), "codebooks"),
    Rule(CODEBOOK_HEAD, ("codebook_heads.{codebook}.weight",), "codebooks"),
)


class HuggingFaceMoST(Architecture):
    """MoST itself: every tensor has a place."""

    name = NAME
    model_types = (MODEL_TYPE,)
    rules = RULES

    def read(self, config: Config) -> ForeignModel:
        """What is checked before the run configuration beside it is read."""
        attention = {"type": config.get("attention_type"), "num_query_groups": 0}
        if attention["type"] == "gqa":
            attention["num_query_groups"] = config.integer("num_key_value_heads")
        model = {
            "num_layers": config.integer("num_hidden_layers"),
            "hidden_size": config.integer("hidden_size"),
            "attention": attention,
        }
        return ForeignModel(model, **read_vocabulary(config), num_experts=config.integer("n_routed_experts"))

    def write(self, config: RunConfig, foreign: ForeignModel) -> dict[str, Any]:
        dtype = str(foreign.dtype).removeprefix("torch.")
        return {**model_config(config), "dtype": dtype, "torch_dtype": dtype}  # the second for older readers

    def target(self, config: RunConfig, experts: str, record: dict[str, Any] | None) -> Target:
        foreign = ForeignModel({}, config.vocab.text_vocab_size, num_experts=config.model.moe.num_experts)
        return Target(foreign, correspondence(config))

    def ids(self, vocab: VocabLayout, vocab_size: int) -> tuple[IdRun, ...]:
        return (IdRun(0, 0, vocab.size),)


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
        "shared_expert_gate": moe.moe_shared_expert_gate,
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
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
        found = source.config.get(name, _ADDED.get(name))
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
            "qkv_bias": attention.add_qkv_bias,
            "qk_norm": attention.qk_layernorm,
        }
    return {
        "attention_type": "mla",
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_head_dim,
        "qk_rope_head_dim": attention.qk_pos_emb_head_dim,
        "v_head_dim": attention.v_head_dim,
        "latent_norm_eps": attention.latent_layernorm_epsilon,
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
