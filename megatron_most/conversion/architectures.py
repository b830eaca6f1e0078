"""What ``config.json`` of each foreign format says, in this project's words, and back."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_most.config import RopeConfig, RunConfig
from megatron_most.conversion import hf_format
from megatron_most.conversion.tables import DEEPSEEK_V2, HEAD_RULE, LLAMA, TIED_HEAD_RULE
from megatron_most.conversion.weight_map import Rule
from megatron_most.errors import CheckpointError

Values = dict[str, Any]

_NOT_WEIGHTS = re.compile(r".*\.rotary_emb\.inv_freq")
_LATENT_NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class ForeignModel:
    """A foreign model's shape.

    Args:
        model: the ``model`` section of a run configuration, without expert groups.
        vocab_size: ids of the embedding.
        precision: ``fp32`` or ``bf16``, whichever its weights are nearer to.
        tied: the output head is the embedding.
        num_experts: of each MoE layer; 0 in a dense model.
        top_k, n_group, topk_group: of its routing.
        choices: for MoST, the experts that text and audio may choose.
        has_audio_ids: its ids are this project's, audio included.
    """

    model: Values
    vocab_size: int
    precision: str
    tied: bool
    num_experts: int = 0
    top_k: int = 1
    n_group: int = 1
    topk_group: int = 1
    choices: tuple[tuple[int, ...], ...] = ()
    has_audio_ids: bool = False


@dataclass(frozen=True)
class Architecture:
    """A foreign format: its name for the command line, its table of weights and its configuration."""

    name: str
    model_types: tuple[str, ...]
    rules: tuple[Rule, ...]
    read: Callable[[Config], ForeignModel]
    write: Callable[[RunConfig, ForeignModel], Values]

    def rules_for(self, tied: bool) -> tuple[Rule, ...]:
        return (*self.rules, TIED_HEAD_RULE if tied else HEAD_RULE)

    def reason_unused(self, name: str, tied: bool) -> str | None:
        """Why a tensor that the table does not name may be left aside; None where it may not."""
        if _NOT_WEIGHTS.fullmatch(name):
            return "follows from the configuration"
        if tied and name == "lm_head.weight":
            return "tied to model.embed_tokens.weight"
        return None


@dataclass
class Config:
    """``config.json`` with errors that name its fields."""

    values: Values
    source: str
    known: set[str] = field(default_factory=set)

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise CheckpointError(f"{self.source}: {name}={value!r}: must be a whole number, not negative")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise CheckpointError(f"{self.source}: {name}={value!r}: must be a finite number")
        return float(value)

    def require(self, name: str, *allowed: object) -> None:
        """Raise unless a field is absent or has a value that this project's model has too."""
        value = self.values.get(name, allowed[0])
        if value not in allowed:
            text = " or ".join(map(repr, allowed))
            raise CheckpointError(f"{self.source}: {name}={value!r}: only {text} can be converted")

    def _value(self, name: str, default: object) -> Any:
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.source}: {name} is missing")
        return value


def read_foreign(values: Values, source: str) -> tuple[Architecture, ForeignModel]:
    """The format and shape of a model from its ``config.json``.

    Raises:
        CheckpointError: an unknown format, or a field whose value has no counterpart here.
    """
    kind = values.get("model_type")
    found = next((entry for entry in ARCHITECTURES if kind in entry.model_types), None)
    if found is None:
        known = ", ".join(name for entry in ARCHITECTURES for name in entry.model_types)
        raise CheckpointError(f"{source}: model_type={kind!r}: can be converted: {known}")
    config = Config(values, source)
    config.require("quantization_config", None)
    return found, found.read(config)


def _read_common(config: Config, attention: Values, moe: Values, **model: Any) -> Values:
    config.require("hidden_act", "silu")
    config.require("attention_bias", False, None)
    config.require("mlp_bias", False, None)
    return {
        "num_layers": config.integer("num_hidden_layers"),
        "hidden_size": config.integer("hidden_size"),
        "ffn_hidden_size": config.integer("intermediate_size"),
        "layernorm_epsilon": config.number("rms_norm_eps", 1e-6),
        "init_method_std": config.number("initializer_range", 0.02),
        "attention": {
            "num_attention_heads": config.integer("num_attention_heads"),
            "rope": _read_rope(config),
            **attention,
        },
        "moe": moe,
        **model,
    }


def _shared(config: Config) -> Values:
    dtype = config.values.get("dtype", config.values.get("torch_dtype"))
    return {
        "vocab_size": config.integer("vocab_size"),
        "precision": "fp32" if dtype == "float32" else "bf16",
        "tied": bool(config.values.get("tie_word_embeddings", False)),
    }


def _read_deepseek(config: Config) -> ForeignModel:
    config.require("moe_layer_freq", 1, None)
    config.require("scoring_func", "softmax")
    config.require("topk_method", "greedy", "group_limited_greedy", None)
    config.require("rms_norm_eps", _LATENT_NORM_EPSILON)
    limited = config.values.get("topk_method") == "group_limited_greedy"
    # Implementations disagree on what it does, alone and with a scaling factor; no published model has it.
    config.require("norm_topk_prob", False, None)
    width = config.integer("moe_intermediate_size")
    rank = config.values.get("q_lora_rank")
    attention = {
        "type": "mla",
        "q_lora_rank": None if rank is None else config.integer("q_lora_rank"),
        "kv_lora_rank": config.integer("kv_lora_rank"),
        "qk_head_dim": config.integer("qk_nope_head_dim"),
        "qk_pos_emb_head_dim": config.integer("qk_rope_head_dim"),
        "v_head_dim": config.integer("v_head_dim"),
    }
    moe = {
        "moe_ffn_hidden_size": width,
        "moe_shared_expert_intermediate_size": width * config.integer("n_shared_experts", 0),
        "moe_router_score_function": "softmax",
        "norm_topk_prob": False,
        "moe_router_topk_scaling_factor": config.number("routed_scaling_factor", 1.0),
    }
    dense = config.integer("first_k_dense_replace", 0)
    return ForeignModel(
        model=_read_common(config, attention, moe, first_k_dense_replace=dense),
        **_shared(config),
        num_experts=config.integer("n_routed_experts"),
        top_k=config.integer("num_experts_per_tok"),
        n_group=config.integer("n_group") if limited else 1,
        topk_group=config.integer("topk_group") if limited else 1,
    )


def _write_deepseek(config: RunConfig, foreign: ForeignModel) -> Values:
    model, attention, moe = config.model, config.model.attention, config.model.moe
    limited = foreign.n_group > 1
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        **_write_common(config, foreign),
        "num_key_value_heads": attention.num_attention_heads,
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_head_dim,
        "qk_rope_head_dim": attention.qk_pos_emb_head_dim,
        "v_head_dim": attention.v_head_dim,
        "first_k_dense_replace": model.first_k_dense_replace,
        "moe_layer_freq": 1,
        "moe_intermediate_size": moe.moe_ffn_hidden_size,
        "n_shared_experts": moe.moe_shared_expert_intermediate_size // moe.moe_ffn_hidden_size,
        "n_routed_experts": foreign.num_experts,
        "num_experts_per_tok": foreign.top_k,
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": moe.moe_router_topk_scaling_factor,
        "topk_method": "group_limited_greedy" if limited else "greedy",
        "n_group": foreign.n_group if limited else None,
        "topk_group": foreign.topk_group if limited else None,
        "seq_aux": moe.moe_router_load_balancing_type == "seq_aux_loss",
        "aux_loss_alpha": moe.moe_aux_loss_coeff,
    }


def _read_most(config: Config) -> ForeignModel:
    config.require("use_modality_aware_routing", True)
    config.require("topk_method", "greedy", None)
    base = _read_deepseek(config)
    choices = []
    for name in ("text_expert_indices", "audio_expert_indices"):
        experts = config.values.get(name)
        valid = isinstance(experts, list) and experts and all(type(expert) is int for expert in experts)
        if not valid or len(set(experts)) < len(experts) or not set(experts) <= set(range(base.num_experts)):
            raise CheckpointError(
                f"{config.source}: {name} must list different experts of 0..{base.num_experts - 1}, got {experts!r}"
            )
        choices.append(tuple(experts))
    model = {**base.model, "moe": {**base.model["moe"], "score_rule": "all"}}
    return ForeignModel(
        model, base.vocab_size, base.precision, base.tied, base.num_experts, base.top_k, choices=tuple(choices)
    )


def _write_most(config: RunConfig, foreign: ForeignModel) -> Values:
    values = _write_deepseek(config, foreign)
    del values["architectures"]
    text, audio = foreign.choices
    return {
        **values,
        "model_type": "MoST",
        "use_modality_aware_routing": True,
        "text_expert_indices": list(text),
        "audio_expert_indices": list(audio),
    }


def _read_llama(config: Config) -> ForeignModel:
    heads = config.integer("num_attention_heads")
    attention = {
        "type": "gqa",
        "num_query_groups": config.integer("num_key_value_heads", heads),
        "kv_channels": config.integer("head_dim", config.integer("hidden_size") // max(1, heads)),
    }
    width = config.integer("intermediate_size")
    moe = {"moe_ffn_hidden_size": width, "moe_shared_expert_intermediate_size": width}
    return ForeignModel(model=_read_common(config, attention, moe, first_k_dense_replace=0), **_shared(config))


def _read_hf(config: Config) -> ForeignModel:
    """What is checked before the run configuration beside it is read."""
    attention = {"type": config.values.get("attention_type"), "num_query_groups": 0}
    if attention["type"] == "gqa":
        attention["num_query_groups"] = config.integer("num_key_value_heads")
    model = {
        "num_layers": config.integer("num_hidden_layers"),
        "hidden_size": config.integer("hidden_size"),
        "attention": attention,
    }
    return ForeignModel(model, **_shared(config), num_experts=config.integer("n_routed_experts"), has_audio_ids=True)


def _write_llama(config: RunConfig, foreign: ForeignModel) -> Values:
    attention = config.model.attention
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **_write_common(config, foreign),
        "num_key_value_heads": attention.num_query_groups,
        "head_dim": attention.kv_channels,
        "mlp_bias": False,
    }


def _write_common(config: RunConfig, foreign: ForeignModel) -> Values:
    model = config.model
    return {
        "vocab_size": foreign.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.attention.num_attention_heads,
        "max_position_embeddings": _max_position(config),
        "rms_norm_eps": model.layernorm_epsilon,
        "initializer_range": model.init_method_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": {"fp32": "float32", "bf16": "bfloat16"}[foreign.precision],
        **_write_rope(config.model.attention.rope),
    }


def _max_position(config: RunConfig) -> int:
    """Positions that the model is said to take. Some readers take its quotient by the original number for the factor
    of stretched frequencies, whatever the factor beside it says."""
    rope = config.model.attention.rope
    if rope.rope_type == "rope":
        return config.data.seq_length
    return round(rope.original_max_position_embeddings * rope.rotary_scaling_factor)


def _read_rope(config: Config) -> Values:
    """Both spellings: ``rope_theta`` and ``rope_scaling``, and the newer ``rope_parameters`` that joins them."""
    joined = config.values.get("rope_parameters") or config.values.get("rope_scaling") or {}
    if not isinstance(joined, dict):
        raise CheckpointError(f"{config.source}: rope_scaling={joined!r}: must be a JSON object or null")
    rope = Config({**joined}, f"{config.source}: rope_scaling")
    base = rope.number("rope_theta", config.number("rope_theta", 10000.0))
    kind = joined.get("rope_type", joined.get("type", "default"))
    if kind in ("default", None):
        return {"rope_type": "rope", "rotary_base": base}
    if kind not in ("yarn", "llama3"):
        raise CheckpointError(f"{rope.source}: type={kind!r}: only 'default', 'yarn' or 'llama3' can be converted")
    values = {
        "rope_type": kind,
        "rotary_base": base,
        "rotary_scaling_factor": rope.number("factor"),
        "original_max_position_embeddings": rope.integer("original_max_position_embeddings"),
    }
    if kind == "llama3":
        rope.require("low_freq_factor", 1, 1.0)
        rope.require("high_freq_factor", 4, 4.0)
        return values
    rope.require("attention_factor", None)
    rope.require("truncate", True)
    mscale, all_dim = joined.get("mscale"), joined.get("mscale_all_dim")
    if bool(mscale) != bool(all_dim):
        raise CheckpointError(f"{rope.source}: mscale={mscale!r} and mscale_all_dim={all_dim!r}: give both or neither")
    return {
        **values,
        "beta_fast": rope.number("beta_fast", 32.0),
        "beta_slow": rope.number("beta_slow", 1.0),
        # Without the two, YaRN's own temperature.
        "mscale": rope.number("mscale") if mscale else 1.0,
        "mscale_all_dim": rope.number("mscale_all_dim") if all_dim else 0.0,
    }


def _write_rope(rope: RopeConfig) -> Values:
    if rope.rope_type == "rope":
        return {"rope_theta": rope.rotary_base, "rope_scaling": None}
    scaling: Values = {
        "type": rope.rope_type,
        "rope_type": rope.rope_type,
        "factor": rope.rotary_scaling_factor,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
    }
    if rope.rope_type == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    else:
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        if rope.mscale_all_dim:
            scaling |= {"mscale": rope.mscale, "mscale_all_dim": rope.mscale_all_dim}
    return {"rope_theta": rope.rotary_base, "rope_scaling": scaling}


ARCHITECTURES = (
    Architecture("deepseek-v2", ("deepseek_v2",), DEEPSEEK_V2, _read_deepseek, _write_deepseek),
    Architecture("most", ("MoST",), DEEPSEEK_V2, _read_most, _write_most),
    Architecture("llama", ("llama",), LLAMA, _read_llama, _write_llama),
    Architecture(
        hf_format.NAME,
        (hf_format.MODEL_TYPE,),
        hf_format.RULES,
        _read_hf,
        lambda config, foreign: hf_format.model_config(config),
    ),
)
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
