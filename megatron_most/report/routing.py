"""Where the tokens went: a map of layers by experts for each modality, and what the statistics did over the run.

Shape letters: E logical experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_most.report.charts import LineChart, Series, line_chart
from megatron_most.report.curves import modality_color, points_of
from megatron_most.report.pools import Pools, read_pools
from megatron_most.report.routing_map import Counts, RoutingMap, max_over_mean, routing_map
from megatron_most.report.run_files import RunFiles, number

_FINAL_SHARE = 0.25
"""The maps show the last quarter of the intervals: what training has arrived at, over enough tokens to be steady."""

Layers = dict[int, dict[str, Counts]]
"""Layer number -> modality -> what its tokens did."""


@dataclass(frozen=True)
class RoutingView:
    """The routing section of the page.

    dead: (modality, most experts without a token in any layer at the last line, size of its choice), where recorded.
    """

    maps: list[RoutingMap]
    charts: list[LineChart]
    first_step: int
    last_step: int
    pairs: int
    outside: int
    dead: list[tuple[str, int, int]]

    @property
    def is_wide(self) -> bool:
        """Whether a map needs the page's full width."""
        return any(one.num_experts > 10 for one in self.maps)


def routing_view(run: RunFiles) -> RoutingView | None:
    """Lay out the routing section; None when there are no counts that can be used (with a note, if there were any)."""
    entries = [(int(line["step"]), _layers(line, run.modalities)) for line in run.routing]
    if not entries:
        return None
    width = max((len(counts.pairs) for _, layers in entries for counts in _all(layers)), default=0)
    entries = [
        (step, {layer: mine for layer, mine in layers.items() if all(len(one.pairs) == width for one in mine.values())})
        for step, layers in entries
    ]
    entries = [(step, layers) for step, layers in entries if layers]
    if len(entries) < len(run.routing):
        run.notes.append(f"{len(run.routing) - len(entries)} lines of routing.jsonl hold no counts and are left out.")
    if not entries or not width:
        return None
    names = list(next(iter(entries[0][1].values())))
    pools = read_pools(run.config)
    if pools is None or pools.num_experts != width or not set(names) <= set(pools.choices):
        pools = None
        run.notes.append("The sizes of the expert groups are unknown, so the routing maps show no borders.")

    final = entries[-max(1, round(len(entries) * _FINAL_SHARE)) :]
    totals = _sum(layers for _, layers in final)
    maps = [
        routing_map(name, modality_color(index), {layer: by_name[name] for layer, by_name in totals.items()}, pools)
        for index, name in enumerate(names)
    ]
    return RoutingView(
        maps=[one for one in maps if one],
        charts=_charts(run.metrics, entries, names, pools),
        first_step=final[0][0],
        last_step=final[-1][0],
        pairs=sum(sum(counts.pairs) for _, layers in entries for counts in _all(layers)),
        outside=sum(int(number(layer.get("outside_group")) or 0) for line in run.routing for layer in _dicts(line)),
        dead=_dead(run.metrics, names, pools),
    )


def _all(layers: Layers) -> Iterable[Counts]:
    return (counts for by_name in layers.values() for counts in by_name.values())


def _dicts(line: dict[str, Any]) -> list[dict[str, Any]]:
    layers = line.get("layers")
    return [layer for layer in layers if isinstance(layer, dict)] if isinstance(layers, list) else []


def _layers(line: dict[str, Any], modalities: Sequence[str]) -> Layers:
    """Every layer of a line that holds whole counts."""
    found: Layers = {}
    for layer in _dicts(line):
        # Older runs have the counts beside the layer's number, and no statistics.
        pairs = (
            layer["pairs"] if isinstance(layer.get("pairs"), dict) else {name: layer.get(name) for name in modalities}
        )
        if pairs and all(_is_numbers(row) and row for row in pairs.values()):
            found[int(number(layer.get("layer")) or 0)] = {
                str(name): _counts(layer, name, pairs[name]) for name in pairs
            }
    return found


def _counts(layer: dict[str, Any], name: str, pairs: list[float]) -> Counts:
    def recorded(key: str) -> Any:
        value = layer.get(key)
        return value.get(name) if isinstance(value, dict) else None

    tokens, scores = int(number(recorded("tokens")) or 0), recorded("mean_score")
    has_scores = _is_numbers(scores) and len(scores) == len(pairs)
    return Counts(
        pairs=[int(count) for count in pairs],
        score_sums=[score * tokens for score in scores] if has_scores else None,
        tokens=tokens,
        entropy=number(recorded("entropy")),
    )


def _is_numbers(row: Any) -> bool:
    return isinstance(row, list) and all(number(value) is not None for value in row)


def _sum(intervals: Iterable[Layers]) -> Layers:
    """All intervals as one."""
    found: dict[int, dict[str, list[Counts]]] = {}
    for layers in intervals:
        for layer, by_name in layers.items():
            for name, counts in by_name.items():
                found.setdefault(layer, {}).setdefault(name, []).append(counts)
    return {
        layer: {name: _total(counts) for name, counts in by_name.items()} for layer, by_name in sorted(found.items())
    }


def _total(counts: list[Counts]) -> Counts:
    measured = [one for one in counts if one.entropy is not None and one.tokens]
    scored = [one.score_sums for one in counts if one.score_sums is not None]
    tokens = sum(one.tokens for one in measured)
    return Counts(
        pairs=[sum(column) for column in zip(*(one.pairs for one in counts), strict=True)],
        score_sums=[sum(column) for column in zip(*scored, strict=True)] if scored else None,
        tokens=sum(one.tokens for one in counts if one.score_sums is not None),
        entropy=sum(one.entropy * one.tokens for one in measured) / tokens if tokens else None,
    )


def _dead(metrics: list[dict[str, Any]], names: Sequence[str], pools: Pools | None) -> list[tuple[str, int, int]]:
    if pools is None:
        return []
    found = [(name, points_of(metrics, f"routing/{name}/dead_experts/max")) for name in names]
    return [(name, int(points[-1][1]), len(pools.choices[name])) for name, points in found if points]


def _charts(
    metrics: list[dict[str, Any]], entries: list[tuple[int, Layers]], names: Sequence[str], pools: Pools | None
) -> list[LineChart]:
    """Charts of what was recorded; dead experts and score outside the choice only where there ever was any."""

    def over_layers(key: str, worst: str = "max") -> list[Series]:
        series = []
        for index, name in enumerate(names):
            mean, extreme = (points_of(metrics, f"routing/{name}/{key}/{kind}") for kind in ("mean", worst))
            series.append(Series(f"{name}, mean over layers", mean, modality_color(index)))
            series.append(Series(f"{name}, worst layer", extreme, modality_color(index), dash=True))
        return series

    def where_any(series: list[Series]) -> list[Series]:
        return series if any(value for one in series for _, value in one.points) else []

    ranks = [
        Series("mean over layers", points_of(metrics, "routing/ep_max_over_mean/mean"), 3),
        Series("worst layer", points_of(metrics, "routing/ep_max_over_mean/max"), 3, dash=True),
    ]
    charts = [
        line_chart("Expert load: busiest over the mean of the choice", _loads(entries, names, pools), "1 is even"),
        line_chart("Entropy of the routing distribution", over_layers("entropy", "min"), "nats", from_zero=True),
        line_chart("Dead experts: chosen by no token", where_any(over_layers("dead_experts")), "experts of a layer"),
        line_chart("Score outside the choice", where_any(over_layers("outside_mass")), "mean per token"),
        line_chart("Expert-parallel ranks: busiest over the mean", ranks, "1 is even"),
    ]
    for key, title, note in (
        ("balance_loss", "Balance loss", " (1 is even)"),
        ("z_loss", "Router z-loss", ""),
        ("orthogonality_loss", "Router orthogonality loss", ""),
    ):
        series = [Series(f"mean over layers{note}", points_of(metrics, key), 6)]
        charts.append(line_chart(f"{title}, before its coefficient", series))
    return [chart for chart in charts if chart]


def _loads(entries: list[tuple[int, Layers]], names: Sequence[str], pools: Pools | None) -> list[Series]:
    """Busiest expert over the mean of the modality's choice at each step: the mean over layers, and the worst layer."""
    series = []
    for index, name in enumerate(names if pools else ()):
        mean, worst = [], []
        for step, layers in entries:
            loads = [[by_name[name].pairs[expert] for expert in pools.choices[name]] for by_name in layers.values()]
            ratios = [ratio for ratio in map(max_over_mean, loads) if ratio]
            if ratios:
                mean.append((step, sum(ratios) / len(ratios)))
                worst.append((step, max(ratios)))
        series.append(Series(f"{name}, mean over layers", mean, modality_color(index)))
        series.append(Series(f"{name}, worst layer", worst, modality_color(index), dash=True))
    return series
