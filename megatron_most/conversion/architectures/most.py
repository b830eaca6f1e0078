"""The MoST format: DeepSeek-V2 with two groups of experts, softmax over all of them (arXiv 2601.10272).

Published checkpoints have 100002 text ids, then one id for each of 500 audio units, then begin and end of audio.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeGuard

from megatron_most.config import RunConfig
from megatron_most.conversion.architecture import ForeignModel, Target, require
from megatron_most.conversion.architectures.deepseek import DeepSeekV2
from megatron_most.conversion.config_json import Config, Values
from megatron_most.conversion.weight_map import Correspondence, IdRun, Origin
from megatron_most.errors import CheckpointError, ConfigError
from megatron_most.moe import ExpertGroups
from megatron_most.vocab import VocabLayout

_TEXT_IDS, _AUDIO_UNITS = 100002, 500
_CHOICES = ("text_expert_indices", "audio_expert_indices")


class MoST(DeepSeekV2):
    name = "most"
    model_types = ("MoST",)
    modes = ()
    has: Values = {**DeepSeekV2.has, "moe": {**DeepSeekV2.has["moe"], "score_rule": "all"}}
    fixed = {**DeepSeekV2.fixed, "use_modality_aware_routing": (True,), "topk_method": ("greedy", None)}

    def complete(self, config: Config, foreign: ForeignModel) -> ForeignModel:
        choices = []
        for name in _CHOICES:
            experts = config.get(name)
            if not _are_different_ids(experts, foreign.num_experts):
                raise CheckpointError(
                    f"{config.source}: {name}={experts!r}: must list different experts from 0 to"
                    f" {foreign.num_experts - 1}"
                )
            choices.append(tuple(experts))
        return dataclasses.replace(super().complete(config, foreign), choices=tuple(choices))

    def own_groups(self, foreign: ForeignModel) -> Values:
        """Experts that both modalities list are common ones."""
        text, audio = foreign.choices
        both = [expert for expert in text if expert in audio]
        pools = [[expert for expert in own if expert not in both] for own in (text, audio)]
        groups: Values = {
            "groups": [
                {"modality": name, "experts": pool, "moe_router_topk": foreign.top_k}
                for name, pool in zip(("text", "audio"), pools, strict=True)
            ]
        }
        return {**groups, "common": {"experts": both}} if both else groups

    def default_vocab(self, foreign: ForeignModel) -> Values:
        audio = {"layout": "flat", "num_codebooks": 1, "codebook_size": _AUDIO_UNITS}
        return {"text_vocab_size": _TEXT_IDS, **audio}

    def ids(self, vocab: VocabLayout, vocab_size: int) -> tuple[IdRun, ...]:
        """The format puts audio units before begin and end of audio. ``frame`` gets the padding row after them, if any.

        Raises:
            ConfigError: the vocabulary layout needs more ids than ``vocab_size``.
        """
        text, num_units = vocab.text_vocab_size, vocab.codec_layout.num_ids
        begin = text + num_units
        if begin + 2 > vocab_size:
            raise ConfigError(
                f"vocab: {text} text ids, {num_units} units and 2 more need {begin + 2} ids, the model has {vocab_size}"
            )
        runs = [IdRun(0, 0, text), IdRun(vocab.begin_of_audio, begin, 2)]
        if num_units:
            runs.append(IdRun(vocab.frame + 1, text, num_units))
        if begin + 2 < vocab_size:
            runs.append(IdRun(vocab.frame, begin + 2, 1))
        return tuple(runs)

    def write(self, config: RunConfig, foreign: ForeignModel) -> Values:
        values = super().write(config, foreign)
        del values["architectures"]
        return {**values, **{name: list(own) for name, own in zip(_CHOICES, foreign.choices, strict=True)}}

    def target(self, config: RunConfig, experts: str, record: dict[str, Any] | None) -> Target:
        moe, vocab = config.model.moe, config.vocab
        require({
            "vocab.further_modalities": (len(moe.groups) == 2, "most has only text and audio"),
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
        })  # fmt: skip
        self.require_shared_experts(config)
        require({
            "model.moe.moe_router_bias_update_rate": (moe.moe_router_bias_update_rate == 0, "most has no expert biases")
        })  # fmt: skip
        vocab_size = vocab.text_vocab_size + vocab.codec_layout.num_ids + 3
        foreign = ForeignModel(
            {},
            vocab_size,
            num_experts=moe.num_experts,
            top_k=moe.groups[0].moe_router_topk,
            choices=ExpertGroups.from_config(moe).choices,
        )
        self.require_holds(config, foreign)
        experts_of_layer = tuple(Origin(expert) for expert in range(moe.num_experts))
        num_layers = config.model.num_layers - config.model.first_k_dense_replace
        return Target(foreign, Correspondence((experts_of_layer,) * num_layers, self.ids(vocab, vocab_size)))


def _are_different_ids(values: Any, count: int) -> TypeGuard[list[int]]:
    """Whether ``values`` is a list of different ids below ``count``, at least one."""
    if not isinstance(values, list) or not values or any(type(value) is not int for value in values):
        return False
    return len(set(values)) == len(values) and set(values) <= set(range(count))
