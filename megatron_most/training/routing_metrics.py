"""From sums of routing statistics to logged metrics: means, dead experts, and imbalance, per layer and over layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_most.config import MoEConfig
from megatron_most.moe import ExpertGroups
from megatron_most.moe.routing_statistics import LOSSES

Layer = dict[str, Any]

_DIGITS = 5


class RoutingMetrics:
    """Accumulates the results of :func:`megatron_most.moe.collect_routing` between two logged lines."""

    def __init__(self, moe: MoEConfig) -> None:
        names = [group.modality for group in moe.groups]
        self.choices = dict(zip(names, ExpertGroups.from_config(moe).choices, strict=True))
        self.sums: list[Layer] = []

    def add(self, layers: list[Layer]) -> None:
        known = {layer["layer"]: layer for layer in self.sums}
        for new in layers:
            mine = known.get(new["layer"])
            known[new["layer"]] = new if mine is None else {**_add(mine, new), "layer": new["layer"]}
        self.sums = [known[number] for number in sorted(known)]

    def layers(self) -> list[Layer]:
        """The layers of a line of ``routing.jsonl``, one dict for each MoE layer.

        It holds the number of the ``layer``; by modality, ``tokens``, ``pairs`` and ``mean_score`` per logical expert,
        and the values of :func:`describe_modality`; ``outside_group``; and, with expert parallelism,
        ``ep_max_over_mean``.
        """
        lines = []
        for layer in self.sums:
            modalities = self._modalities(layer)
            line = {
                "layer": layer["layer"],
                "tokens": layer["tokens"],
                "pairs": layer["pairs"],
                "mean_score": {
                    name: [_short(score / layer["tokens"][name]) for score in layer["scores"][name]]
                    for name in modalities
                },
                "outside_group": layer["outside_group"],
            }
            for key in ("dead_experts", "max_over_mean", "entropy", "outside_mass"):
                line[key] = {name: _short(values[key]) for name, values in modalities.items()}
            if layer["rank_imbalance"][1]:
                line["ep_max_over_mean"] = _short(_mean_imbalance(layer))
            lines.append(line)
        return lines

    def metrics(self) -> dict[str, float]:
        """Scalars over all MoE layers.

        - ``balance_loss``, ``z_loss``, ``orthogonality_loss``: mean over layers and tokens, without the coefficient;
          only those that are computed;
        - ``routing/<modality>/<key>/mean`` and the worst layer, ``/max`` (for ``entropy``, ``/min``), for each key of
          :func:`describe_modality`;
        - ``routing/ep_max_over_mean/mean`` and ``/max``: pairs of the busiest expert-parallel rank over the mean,
          averaged over micro-batches.
        """
        num_tokens = sum(sum(layer["tokens"].values()) for layer in self.sums)
        totals = {name: sum(layer[name] for layer in self.sums) for name in LOSSES}
        found = {name: total / num_tokens for name, total in totals.items() if total}
        described = [self._modalities(layer) for layer in self.sums]
        for name in self.choices:
            mine = [modalities[name] for modalities in described if name in modalities]
            for key in mine[0] if mine else ():
                found |= _over_layers(f"routing/{name}/{key}", [values[key] for values in mine])
        ratios = [_mean_imbalance(layer) for layer in self.sums if layer["rank_imbalance"][1]]
        if ratios:
            found |= _over_layers("routing/ep_max_over_mean", ratios)
        return found

    def _modalities(self, layer: Layer) -> dict[str, dict[str, float]]:
        """:func:`describe_modality` of each modality that had a token."""
        return {
            name: describe_modality(
                layer["tokens"][name], layer["pairs"][name], layer["scores"][name], layer["entropy"][name], choice
            )
            for name, choice in self.choices.items()
            if layer["tokens"][name]
        }


def describe_modality(
    tokens: int, pairs: Sequence[int], scores: Sequence[float], entropy: float, choice: Sequence[int]
) -> dict[str, float]:
    """How one modality was routed in one layer.

    Args:
        tokens: number of tokens, at least 1.
        pairs, scores: ``[E]``, sums over the tokens, in logical order.
        entropy: sum over the tokens.
        choice: logical experts that the modality may choose.

    Returns:
        ``dead_experts``: experts of the choice without a pair; ``max_over_mean``: pairs of the busiest expert of the
        choice over the mean; ``entropy`` of the distribution over the choice in nats, mean over tokens; and
        ``outside_mass``: total score of experts outside the choice, mean over tokens.
    """
    mine = [pairs[expert] for expert in choice]
    allowed = set(choice)
    outside = sum(score for expert, score in enumerate(scores) if expert not in allowed)
    return {
        "dead_experts": sum(count == 0 for count in mine),
        "max_over_mean": max(mine) * len(mine) / sum(mine),
        "entropy": entropy / tokens,
        "outside_mass": outside / tokens,
    }


def _over_layers(name: str, values: Sequence[float]) -> dict[str, float]:
    is_entropy = name.endswith("/entropy")
    worst = {f"{name}/min": min(values)} if is_entropy else {f"{name}/max": max(values)}
    return {f"{name}/mean": sum(values) / len(values), **worst}


def _mean_imbalance(layer: Layer) -> float:
    total, count = layer["rank_imbalance"]
    return total / count


def _short(value: float) -> float:
    """Rounded to a few digits, because these values are most of what a run logs."""
    return value if isinstance(value, int) else float(f"{value:.{_DIGITS}g}")


def _add(mine: Any, new: Any) -> Any:
    """Sum of two nested structures of numbers with the same shape."""
    if isinstance(mine, dict):
        return {key: _add(value, new[key]) for key, value in mine.items()}
    if isinstance(mine, list):
        return [_add(a, b) for a, b in zip(mine, new, strict=True)]
    return mine + new
