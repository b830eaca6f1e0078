"""Where the experts of a MoST model come from: partition, expand, upcycle, and what they do to a base model's function.

- ``partition``: the base's experts are split between the modalities. Text loses those that become audio's.
- ``expand``: text keeps all of the base's experts, every other pool starts with copies. Text computes what it did.
- ``upcycle``: every expert, and the shared one, starts as the dense MLP. Every token computes what it did.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_most.config import RunConfig
from megatron_most.conversion.architectures import ForeignModel
from megatron_most.conversion.weight_map import Origin
from megatron_most.errors import CheckpointError, ConfigError
from megatron_most.files import read_json
from megatron_most.moe import ExpertGroups

MODES = ("partition", "expand", "upcycle")

_UPCYCLED_EXPERTS, _UPCYCLED_TOP_K = 8, 2

Usage = dict[str, list[list[float]]]
"""For each modality, how often each base expert was chosen, by MoE layer."""
LayerOrigins = tuple[Origin | None, ...]


def default_groups(
    mode: str, foreign: ForeignModel, modalities: Sequence[str], has_usage: bool
) -> list[dict[str, Any]]:
    """The ``model.moe.groups`` section for a mode, where the configuration gives none."""
    num, top_k = foreign.num_experts, foreign.top_k
    if mode == "upcycle":
        return [
            {"modality": name, "size": _UPCYCLED_EXPERTS, "moe_router_topk": _UPCYCLED_TOP_K} for name in modalities
        ]
    if mode == "expand":
        limits = {"moe_router_num_groups": foreign.n_group, "moe_router_group_topk": foreign.topk_group}
        return [{"modality": name, "size": num, "moe_router_topk": top_k, **limits} for name in modalities]
    bounds = [place * num // len(modalities) for place in range(len(modalities) + 1)]
    runs = [list(range(start, stop)) for start, stop in zip(bounds, bounds[1:], strict=False)]
    return [
        {"modality": name, "moe_router_topk": top_k, **({"size": len(run)} if has_usage else {"experts": run})}
        for name, run in zip(modalities, runs, strict=True)
    ]


def most_groups(foreign: ForeignModel) -> dict[str, Any]:
    """The groups of a model in the MoST format; experts that both modalities list are common ones."""
    text, audio = foreign.choices
    both = [expert for expert in text if expert in audio]
    pools = [[expert for expert in own if expert not in both] for own in (text, audio)]
    groups: dict[str, Any] = {
        "groups": [
            {"modality": name, "experts": pool, "moe_router_topk": foreign.top_k}
            for name, pool in zip(("text", "audio"), pools, strict=True)
        ]
    }
    return {**groups, "common": {"experts": both}} if both else groups


def origins(mode: str, config: RunConfig, foreign: ForeignModel, usage: Usage | None) -> tuple[LayerOrigins, ...]:
    """For each MoE layer and logical expert, the base's expert that it starts as.

    Raises:
        ConfigError: the groups do not fit the mode and the base.
    """
    layers = range(config.model.num_layers - config.model.first_k_dense_replace)
    make = {"partition": _partition, "expand": _expand, "upcycle": _upcycle}[mode]
    return tuple(make(config, foreign, None if usage is None else _of_layer(usage, layer)) for layer in layers)


def read_usage(path: str | Path, foreign: ForeignModel, num_moe_layers: int, modalities: Sequence[str]) -> Usage:
    """Usage counts: JSON, modality -> a list for each MoE layer of a number for each of the base's experts.

    Raises:
        CheckpointError: unreadable, or of another model.
    """
    usage = read_json(path, CheckpointError)
    for modality, layers in usage.items():
        where = f"{path}: {modality}"
        if modality not in modalities:
            raise CheckpointError(f"{where}: is no modality of the vocabulary; those are {', '.join(modalities)}")
        if not isinstance(layers, list) or len(layers) != num_moe_layers:
            raise CheckpointError(f"{where}: must hold a list for each of the {num_moe_layers} MoE layers")
        for layer, counts in enumerate(layers):
            valid = isinstance(counts, list) and len(counts) == foreign.num_experts
            if not valid or not all(type(count) in (int, float) and 0 <= count < math.inf for count in counts):
                raise CheckpointError(
                    f"{where}[{layer}]: must hold a finite number, not negative, for each of"
                    f" {foreign.num_experts} experts"
                )
    if "text" not in usage:
        raise CheckpointError(f"{path}: needs counts for text")
    return usage


def _of_layer(usage: Usage, layer: int) -> dict[str, list[float]]:
    """Each modality's counts of one layer as shares of its total."""
    return {name: [count / (sum(layers[layer]) or 1) for count in layers[layer]] for name, layers in usage.items()}


def _partition(config: RunConfig, foreign: ForeignModel, usage: dict[str, list[float]] | None) -> LayerOrigins:
    moe, num = config.model.moe, foreign.num_experts
    if moe.num_experts != num:
        raise ConfigError(
            f"model.moe.groups: partition shares out the base's {num} experts, the groups have {moe.num_experts}"
        )
    if usage is None:
        return tuple(Origin(expert) for expert in range(num))
    if any(group.experts for group in moe.groups):
        raise ConfigError("model.moe.groups: give sizes, not lists of experts, where usage counts choose the experts")
    # The pools take their share in turn, each what it uses most beyond what the others use; the last takes the rest.
    left, taken = list(range(num)), []
    for name, pool in ExpertGroups.from_config(moe).pools.items():
        own = usage.get(name, [0.0] * num)
        others = [counts for other, counts in usage.items() if other != name]
        preference = [own[e] - sum(counts[e] for counts in others) / max(1, len(others)) for e in range(num)]
        chosen = sorted(left, key=lambda expert: (-preference[expert], expert))[: len(pool)]
        taken += sorted(chosen)
        left = [expert for expert in left if expert not in chosen]
    return tuple(Origin(expert) for expert in taken)


def _expand(config: RunConfig, foreign: ForeignModel, usage: dict[str, list[float]] | None) -> LayerOrigins:
    moe, num = config.model.moe, foreign.num_experts
    groups = ExpertGroups.from_config(moe)
    text = moe.groups[0]
    if len(groups.choices[0]) != num:
        raise ConfigError(f"model.moe.groups[text].size={text.size}: expand gives text all of the base's {num} experts")
    for name, value in (
        ("moe_router_topk", foreign.top_k),
        ("moe_router_num_groups", foreign.n_group),
        ("moe_router_group_topk", foreign.topk_group),
    ):
        if getattr(text, name) != value:
            raise ConfigError(f"model.moe.groups[text].{name}={getattr(text, name)}: the base has {value}")
    if moe.score_rule == "all" and not moe.norm_topk_prob:
        raise ConfigError("model.moe.score_rule='all': would change text's scores; expand needs 'group'")
    found: list[Origin | None] = [None] * moe.num_experts
    for place, expert in enumerate(groups.choices[0]):
        found[expert] = Origin(place)
    for name, pool in groups.pools.items():
        targets = [expert for expert in pool if found[expert] is None]
        for expert, source in zip(targets, _most_used(name, len(targets), num, usage), strict=True):
            found[expert] = Origin(source, copy=True)
    return tuple(found)


def _most_used(name: str, count: int, num: int, usage: dict[str, list[float]] | None) -> list[int]:
    """The ``count`` experts of which a pool gets copies."""
    if count > num:
        raise ConfigError(f"model.moe.groups[{name}].size={count}: the base has {num} experts to copy")
    if count in (0, num):
        return list(range(count))
    if usage is None:
        raise ConfigError(
            f"model.moe.groups[{name}].size={count}: copies of some of the base's {num} experts are of those most"
            " used; give counts with --usage"
        )
    counts = usage.get(name, usage["text"])
    return sorted(sorted(range(num), key=lambda expert: (-counts[expert], expert))[:count])


def _upcycle(config: RunConfig, foreign: ForeignModel, usage: dict[str, list[float]] | None) -> LayerOrigins:
    moe = config.model.moe
    if not moe.norm_topk_prob or moe.moe_router_topk_scaling_factor != 1:
        raise ConfigError(
            "model.moe: upcycling keeps the function with norm_topk_prob=true and moe_router_topk_scaling_factor=1 only"
        )
    if moe.moe_shared_expert_intermediate_size not in (0, moe.moe_ffn_hidden_size):
        raise ConfigError(
            f"model.moe.moe_shared_expert_intermediate_size={moe.moe_shared_expert_intermediate_size}: the shared"
            f" expert starts as the dense MLP too, of width {moe.moe_ffn_hidden_size}; 0 for none"
        )
    return (Origin(0),) * moe.num_experts
