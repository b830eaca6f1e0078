"""Chooses the foreign model that a checkpoint is exported as, and checks that its format can hold the model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_most.config import RunConfig
from megatron_most.conversion import hf_format
from megatron_most.conversion.architectures import ForeignModel
from megatron_most.conversion.import_plan import RECORD, most_ids
from megatron_most.conversion.weight_map import Correspondence, IdRun, Origin
from megatron_most.errors import CheckpointError, ConfigError
from megatron_most.files import read_json
from megatron_most.moe import ExpertGroups


@dataclass(frozen=True)
class Target:
    """The foreign model to make.

    Args:
        foreign: its shape.
        both: which experts and ids correspond.
        same_text: whether it computes for text what this model computes.
        note: what the user should know about the expert numbers; may be empty.
    """

    foreign: ForeignModel
    both: Correspondence
    same_text: bool = True
    note: str = ""


def choose_target(directory: Path, config: RunConfig, name: str, experts: str) -> Target:
    """The foreign model of format ``name`` that the checkpoint in ``directory`` becomes.

    Args:
        experts: for ``deepseek-v2``, ``text`` for the experts that text may choose, or ``all``.

    Raises:
        ConfigError: the format cannot hold this model.
        CheckpointError: the record of the import is unreadable.
    """
    if experts == "all" and name != "deepseek-v2":
        raise ConfigError(f"--experts=all: is only for --format deepseek-v2, not {name}")
    if name == hf_format.NAME:
        return _as_itself(config)
    if name == "most":
        return _as_most(config)
    if name == "llama":
        return _as_llama(config)
    if experts == "all":
        return _as_whole_base(config, _import_record(directory, config))
    return _as_text_model(config)


def _import_record(directory: Path, config: RunConfig) -> dict[str, Any] | None:
    """The record of the import that made this checkpoint, or the one that its run started from; None if it is gone."""
    places = [directory, *([Path(config.checkpoint.load)] if config.checkpoint.load else [])]
    found = next((place / RECORD for place in places if (place / RECORD).is_file()), None)
    return None if found is None else read_json(found, CheckpointError)


def _as_itself(config: RunConfig) -> Target:
    """The whole model: every tensor has a place."""
    foreign = _foreign(config, config.model.moe.num_experts, 1, 1, 1)
    return Target(dataclasses.replace(foreign, has_audio_ids=True), hf_format.correspondence(config))


def _as_text_model(config: RunConfig) -> Target:
    """DeepSeek-V2 with the experts that text may choose. It computes for text what this model computes."""
    moe = config.model.moe
    _require_deepseek(config)
    if moe.score_rule == "all":
        raise ConfigError(
            "model.moe.score_rule='all': cannot be exported: text's gates depend on the scores of experts that text may"
            " not choose"
        )
    text = moe.groups[0]
    choice = ExpertGroups.from_config(moe).choices[0]
    places = {expert: Origin(place) for place, expert in enumerate(choice)}
    experts = tuple(places.get(expert) for expert in range(moe.num_experts))
    foreign = _foreign(
        config, len(choice), text.moe_router_topk, text.moe_router_num_groups, text.moe_router_group_topk
    )
    return Target(foreign, _both(config, experts))


def _as_whole_base(config: RunConfig, record: dict[str, Any] | None) -> Target:
    """DeepSeek-V2 with every expert, numbered as in the base; without a ``record``, as in this model."""
    moe = config.model.moe
    _require_deepseek(config)
    if moe.router_weights == "per_modality":
        raise ConfigError("model.moe.router_weights='per_modality': deepseek-v2 has one router for all experts")
    layers = config.model.num_layers - config.model.first_k_dense_replace
    experts: tuple[tuple[Origin | None, ...], ...]
    experts = (tuple(Origin(expert) for expert in range(moe.num_experts)),) * layers
    limits, note = (1, 1), f"experts keep their logical numbers: no {RECORD} gives their numbers in a base model"
    if record is not None:
        note = ""
        experts = tuple(
            tuple(None if origin is None else Origin(*origin) for origin in layer) for layer in record["origins"]
        )
        source = record["source_config"]
        if source.get("topk_method") == "group_limited_greedy":
            limits = (source["n_group"], source["topk_group"])
    num_experts = 1 + max(origin.expert for origin in experts[0] if origin is not None)
    foreign = _foreign(config, num_experts, moe.groups[0].moe_router_topk, *limits)
    kept = {place for place, origin in enumerate(experts[0]) if origin is not None and not origin.copy}
    same_text = kept == set(ExpertGroups.from_config(moe).choices[0])
    return Target(foreign, Correspondence(experts, _text_ids(config)), same_text, note)


def _as_most(config: RunConfig) -> Target:
    moe = config.model.moe
    _require_deepseek(config)
    names = [group.modality for group in moe.groups]
    rules = {
        "vocab.further_modalities": (len(names) == 2, "most has only text and audio"),
        "model.moe.score_rule": (
            moe.score_rule == "all",
            "most computes the softmax over all experts (score_rule=all)",
        ),
        "model.moe.router_weights": (moe.router_weights == "shared", "most has one router for both modalities"),
        "model.moe.groups.moe_router_topk": (
            len({group.moe_router_topk for group in moe.groups}) == 1,
            "most has one moe_router_topk",
        ),
        "model.moe.groups.moe_router_num_groups": (
            all(group.moe_router_num_groups == 1 for group in moe.groups),
            "most has no group limits",
        ),
    }
    _require(rules)
    vocab = config.vocab
    vocab_size = vocab.text_vocab_size + vocab.codec_layout.num_ids + 3
    choices = ExpertGroups.from_config(moe).choices
    foreign = _foreign(config, moe.num_experts, moe.groups[0].moe_router_topk, 1, 1)
    foreign = dataclasses.replace(foreign, vocab_size=vocab_size, choices=choices)
    experts = tuple(Origin(expert) for expert in range(moe.num_experts))
    return Target(foreign, dataclasses.replace(_both(config, experts), ids=most_ids(vocab, vocab_size)))


def _as_llama(config: RunConfig) -> Target:
    """The dense model whose MLP all experts are, as after upcycling. That they are is checked tensor by tensor."""
    model, moe = config.model, config.model.moe
    width = moe.moe_ffn_hidden_size
    shared = moe.moe_shared_expert_intermediate_size in (0, width)
    rules = {
        "model.attention.type": (model.attention.type == "gqa", "llama has grouped-query attention (gqa)"),
        "model.moe.norm_topk_prob": (moe.norm_topk_prob, "gates must sum to 1"),
        "model.moe.moe_router_topk_scaling_factor": (moe.moe_router_topk_scaling_factor == 1, "gates must sum to 1"),
        "model.moe.moe_ffn_hidden_size": (
            width == model.ffn_hidden_size,
            "must equal model.ffn_hidden_size",
        ),
        "model.moe.moe_shared_expert_intermediate_size": (
            shared,
            "the shared expert must have the width of the dense MLP, or be absent",
        ),
    }
    _require(rules)
    foreign = _foreign(config, 0, 1, 1, 1)
    return Target(foreign, _both(config, (Origin(0),) * moe.num_experts))


def _require_deepseek(config: RunConfig) -> None:
    model, moe = config.model, config.model.moe
    shared, width = moe.moe_shared_expert_intermediate_size, moe.moe_ffn_hidden_size
    rules = {
        "model.attention.type": (model.attention.type == "mla", "the format has multi-latent attention (mla)"),
        "model.moe.moe_router_score_function": (
            moe.moe_router_score_function == "softmax",
            "the format has softmax scores",
        ),
        "model.moe.moe_router_bias_update_rate": (
            moe.moe_router_bias_update_rate == 0,
            "the format has no expert biases",
        ),
        "model.moe.moe_shared_expert_intermediate_size": (
            shared > 0 and shared % width == 0,
            f"must be a multiple of moe_ffn_hidden_size={width}, at least once",
        ),
        "model.layernorm_epsilon": (model.layernorm_epsilon == 1e-6, "the format fixes 1e-6 in some norms"),
        "model.moe.norm_topk_prob": (not moe.norm_topk_prob, "implementations of the format disagree on its meaning"),
    }
    _require(rules)


def _require(rules: dict[str, tuple[bool, str]]) -> None:
    for name, (holds, rule) in rules.items():
        if not holds:
            raise ConfigError(f"{name}: cannot be exported: {rule}")


def _foreign(config: RunConfig, num_experts: int, top_k: int, n_group: int, topk_group: int) -> ForeignModel:
    text_ids = config.vocab.text_vocab_size
    return ForeignModel({}, text_ids, torch.float32, False, num_experts, top_k, n_group, topk_group)


def _both(config: RunConfig, experts: tuple[Origin | None, ...]) -> Correspondence:
    layers = config.model.num_layers - config.model.first_k_dense_replace
    return Correspondence((experts,) * layers, _text_ids(config))


def _text_ids(config: RunConfig) -> tuple[IdRun, ...]:
    return (IdRun(0, 0, config.vocab.text_vocab_size),)
