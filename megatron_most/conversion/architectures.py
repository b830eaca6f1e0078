"""Translates ``config.json`` of each foreign format into a run configuration, and back."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch

from megatron_most.config import RunConfig
from megatron_most.conversion import hf_format
from megatron_most.conversion.config_json import Config, Values, max_positions, read_rope, write_rope
from megatron_most.conversion.tables import DEEPSEEK_V2, HEAD_RULE, LLAMA, TIED_HEAD_RULE
from megatron_most.conversion.weight_map import Rule
from megatron_most.errors import CheckpointError

_NOT_WEIGHTS = re.compile(r".*\.rotary_emb\.inv_freq")
_LATENT_NORM_EPSILON = 1e-6
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ForeignModel:
    """The shape of a foreign model.

    Args:
        model: the ``model`` section of a run configuration, without expert groups.
        vocab_size: number of rows of the embedding.
        dtype: the element type that ``config.json`` gives for the weights.
        tied: whether the output head is the embedding.
        num_experts: experts in each MoE layer; 0 in a dense model.
        top_k, n_group, topk_group: routing of the format, by its names.
        choices: the experts that text and audio may choose, for the MoST format only.
        has_audio_ids: whether its ids are those of this project, audio included.
    """

    model: Values
    vocab_size: int
    dtype: torch.dtype
    tied: bool
    num_experts: int = 0
    top_k: int = 1
    n_group: int = 1
    topk_group: int = 1
    choices: tuple[tuple[int, ...], ...] = ()
    has_audio_ids: bool = False


@dataclass(frozen=True)
class Architecture:
    """A foreign format: its name on the command line, its weight table, and how to read and write ``config.json``."""

    name: str
    model_types: tuple[str, ...]
    rules: tuple[Rule, ...]
    read: Callable[[Config], ForeignModel]
    write: Callable[[RunConfig, ForeignModel], Values]

    def rules_for(self, tied: bool) -> tuple[Rule, ...]:
        return (*self.rules, TIED_HEAD_RULE if tied else HEAD_RULE)

    def reason_unused(self, name: str, tied: bool) -> str | None:
        """Why a tensor that the table does not name may be ignored; None if it may not."""
        if _NOT_WEIGHTS.fullmatch(name):
            return "follows from the configuration"
        if tied and name in HEAD_RULE.foreign:
            return "tied to model.embed_tokens.weight"
        return None


def read_foreign(values: Values, source: str) -> tuple[Architecture, ForeignModel]:
    """The format and shape of a model, from the ``values`` of its ``config.json``.

    Args:
        source: the file's name in error messages.

    Raises:
        CheckpointError: the format is unknown, or a field has a value that cannot be converted.
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
            "rope": read_rope(config),
            **attention,
        },
        "moe": moe,
        **model,
    }


def _shared(config: Config) -> Values:
    config.require("tie_word_embeddings", False, True, None)
    dtype = str(config.values.get("dtype", config.values.get("torch_dtype"))).removeprefix("torch.")
    return {
        "vocab_size": config.integer("vocab_size"),
        "dtype": _DTYPES.get(dtype, torch.bfloat16),
        "tied": bool(config.values.get("tie_word_embeddings", False)),
    }


def _read_deepseek(config: Config) -> ForeignModel:
    config.require("moe_layer_freq", 1, None)
    config.require("scoring_func", "softmax")
    config.require("topk_method", "greedy", "group_limited_greedy", None)
    config.require("rms_norm_eps", _LATENT_NORM_EPSILON)
    limited = config.values.get("topk_method") == "group_limited_greedy"
    # Implementations disagree on its meaning, alone and with a scaling factor; no published model sets it.
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
        if not _are_different_ids(experts, base.num_experts):
            raise CheckpointError(
                f"{config.source}: {name}={experts!r}: must list different experts from 0 to {base.num_experts - 1}"
            )
        choices.append(tuple(experts))
    model = {**base.model, "moe": {**base.model["moe"], "score_rule": "all"}}
    return replace(base, model=model, choices=tuple(choices))


def _are_different_ids(values: Any, count: int) -> TypeGuard[list[int]]:
    """Whether ``values`` is a list of different ids below ``count``, at least one."""
    if not isinstance(values, list) or not values or any(type(value) is not int for value in values):
        return False
    return len(set(values)) == len(values) and set(values) <= set(range(count))


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
        "max_position_embeddings": max_positions(config),
        "rms_norm_eps": model.layernorm_epsilon,
        "initializer_range": model.init_method_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": str(foreign.dtype).removeprefix("torch."),
        **write_rope(config.model.attention.rope),
    }


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
