"""The modes of an import: where the experts come from, and what that changes.

- ``partition``: the base's experts are divided between the modalities. Text loses the experts of the others.
- ``expand``: text keeps all experts of the base, and every other pool gets copies. Text logits do not change.
- ``upcycle``: every expert, and the shared one, starts as the dense MLP. No logits change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_most.config import RunConfig
from megatron_most.conversion.architecture import ForeignModel
from megatron_most.conversion.weight_map import Origin
from megatron_most.errors import CheckpointError, ConfigError
from megatron_most.files import read_json
from megatron_most.moe import ExpertGroups

MODES = ("partition", "expand", "upcycle")

_UPCYCLED_EXPERTS, _UPCYCLED_TOP_K = 8, 2

Usage = dict[str, list[list[float]]]
"""Modality -> for each MoE layer, how often each expert of the base was chosen."""
LayerOrigins = tuple[Origin | None, ...]


def default_groups(
    mode: str, foreign: ForeignModel, modalities: Sequence[str], has_usage: bool
) -> list[dict[str, Any]]:
    """The default of ``model.moe.groups`` for a mode."""
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


def origins(mode: str, config: RunConfig, foreign: ForeignModel, usage: Usage | None) -> tuple[LayerOrigins, ...]:
    """For each MoE layer and logical expert, the expert of the base that it starts as.

    Raises:
        ConfigError: the groups do not fit the mode and the base.
    """
    layers = range(config.model.num_layers - config.model.first_k_dense_replace)
    make = {"partition": _partition, "expand": _expand, "upcycle": _upcycle}[mode]
    return tuple(make(config, foreign, None if usage is None else _of_layer(usage, layer)) for layer in layers)


def read_usage(path: str | Path, foreign: ForeignModel, num_moe_layers: int, modalities: Sequence[str]) -> Usage:
    """Read usage counts: JSON, modality -> one list per MoE layer, with one number per expert of the base.

    Raises:
        CheckpointError: the file is unreadable, or does not fit the model.
    """
    usage = read_json(path, CheckpointError)
    for modality, layers in usage.items():
        where = f"{path}: {modality}"
        if modality not in modalities:
            raise CheckpointError(f"{where}: is not a modality of the vocabulary; it has {', '.join(modalities)}")
        if not isinstance(layers, list) or len(layers) != num_moe_layers:
            raise CheckpointError(f"{where}: must hold one list per MoE layer, {num_moe_layers}")
        for layer, counts in enumerate(layers):
            valid = isinstance(counts, list) and len(counts) == foreign.num_experts
            if not valid or not all(type(count) in (int, float) and 0 <= count < math.inf for count in counts):
                raise CheckpointError(
                    f"{where}[{layer}]: must hold one finite number, at least 0, for each of the"
                    f" {foreign.num_experts} experts"
                )
    if "text" not in usage:
        raise CheckpointError(f"{path}: has no counts for text")
    return usage


def _of_layer(usage: Usage, layer: int) -> dict[str, list[float]]:
    """Each modality's counts of one layer as fractions of its total."""
    return {name: [count / (sum(layers[layer]) or 1) for count in layers[layer]] for name, layers in usage.items()}


def _partition(config: RunConfig, foreign: ForeignModel, usage: dict[str, list[float]] | None) -> LayerOrigins:
    moe, num = config.model.moe, foreign.num_experts
    if moe.num_experts != num:
        raise ConfigError(f"model.moe.groups: have {moe.num_experts} experts, partition divides the base's {num}")
    if usage is None:
        return tuple(Origin(expert) for expert in range(num))
    if any(group.experts for group in moe.groups):
        raise ConfigError("model.moe.groups: must have sizes, not lists of experts, if --usage chooses the experts")
    # Each pool in turn takes the experts that it uses most compared to the others; the last pool takes the rest.
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
        raise ConfigError(f"model.moe.groups[text].size={text.size}: expand gives text all {num} experts of the base")
    for name, value in (
        ("moe_router_topk", foreign.top_k),
        ("moe_router_num_groups", foreign.n_group),
        ("moe_router_group_topk", foreign.topk_group),
    ):
        if getattr(text, name) != value:
            raise ConfigError(f"model.moe.groups[text].{name}={getattr(text, name)}: the base has {value}")
    if moe.score_rule == "all" and not moe.norm_topk_prob:
        raise ConfigError("model.moe.score_rule='all': would change text's scores; must be 'group' for expand")
    found: list[Origin | None] = [None] * moe.num_experts
    for place, expert in enumerate(groups.choices[0]):
        found[expert] = Origin(place)
    for name, pool in groups.pools.items():
        targets = [expert for expert in pool if found[expert] is None]
        for expert, source in zip(targets, _most_used(name, len(targets), num, usage), strict=True):
            found[expert] = Origin(source, copy=True)
    return tuple(found)


def _most_used(name: str, count: int, num: int, usage: dict[str, list[float]] | None) -> list[int]:
    """The ``count`` experts of the base that are copied into a pool."""
    if count > num:
        raise ConfigError(f"model.moe.groups[{name}].size={count}: the base has only {num} experts to copy")
    if count in (0, num):
        return list(range(count))
    if usage is None:
        raise ConfigError(
            f"model.moe.groups[{name}].size={count}: the most used of the base's {num} experts are copied; give their"
            " counts with --usage"
        )
    counts = usage.get(name, usage["text"])
    return sorted(sorted(range(num), key=lambda expert: (-counts[expert], expert))[:count])


def _upcycle(config: RunConfig, foreign: ForeignModel, usage: dict[str, list[float]] | None) -> LayerOrigins:
    moe = config.model.moe
    if not moe.norm_topk_prob or moe.moe_router_topk_scaling_factor != 1:
        raise ConfigError(
            "model.moe: upcycling needs norm_topk_prob=true and moe_router_topk_scaling_factor=1: gates must sum to 1"
        )
    if moe.moe_shared_expert_intermediate_size not in (0, moe.moe_ffn_hidden_size):
        raise ConfigError(
            f"model.moe.moe_shared_expert_intermediate_size={moe.moe_shared_expert_intermediate_size}: must be"
            f" {moe.moe_ffn_hidden_size}, the width of the dense MLP that it starts as, or 0 for no shared expert"
        )
    return (Origin(0),) * moe.num_experts
