"""Where the tokens went: a map of layers by experts for each modality, and the routing statistics over the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_most.report.charts import LineChart, Series, line_chart
from megatron_most.report.curves import modality_color, points_of
from megatron_most.report.pools import Pools, read_pools
from megatron_most.report.routing_counts import Interval, num_outside, read_intervals, total
from megatron_most.report.routing_map import RoutingMap, max_over_mean, routing_map
from megatron_most.report.run_files import RunFiles

_MAP_SHARE = 0.25
"""The maps show the last quarter of the intervals: what training has arrived at, over enough tokens to be steady."""


@dataclass(frozen=True)
class RoutingView:
    """The routing section of the page.

    Args:
        first_step, last_step: ends of the first and last interval that the maps show.
        pairs, outside: routed (token, expert) pairs of the whole run, and those outside of their choice.
        dead: (modality, dead experts in the layer with the most of them, size of its choice) at the last line, where
            recorded.
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
    """Lay out the routing section; None without counts. What cannot be used becomes a note of the run."""
    intervals = read_intervals(run)
    if not intervals:
        return None
    modalities = list(next(iter(intervals[0].layers.values())))
    pools = _pools(run, modalities, len(next(intervals[0].all_counts()).pairs))
    shown = intervals[-max(1, round(len(intervals) * _MAP_SHARE)) :]
    return RoutingView(
        maps=_maps(shown, modalities, pools),
        charts=routing_charts(run.metrics, intervals, modalities, pools),
        first_step=shown[0].step,
        last_step=shown[-1].step,
        pairs=sum(sum(counts.pairs) for one in intervals for counts in one.all_counts()),
        outside=num_outside(run),
        dead=_dead(run.metrics, modalities, pools),
    )


def _pools(run: RunFiles, modalities: Sequence[str], num_experts: int) -> Pools | None:
    """The pools of the run's configuration, if they are those of its counts."""
    pools = read_pools(run.config)
    if pools is not None and pools.num_experts == num_experts and set(modalities) <= set(pools.choices):
        return pools
    run.notes.append("The sizes of the expert groups are unknown, so the routing maps show no borders.")
    return None


def _maps(intervals: Sequence[Interval], modalities: Sequence[str], pools: Pools | None) -> list[RoutingMap]:
    layers = total(intervals)
    maps = []
    for index, name in enumerate(modalities):
        counts = {layer: by_modality[name] for layer, by_modality in layers.items()}
        if any(sum(one.pairs) for one in counts.values()):
            maps.append(routing_map(name, modality_color(index), counts, pools))
    return maps


def _dead(metrics: list[dict[str, Any]], modalities: Sequence[str], pools: Pools | None) -> list[tuple[str, int, int]]:
    if pools is None:
        return []
    found = [(name, points_of(metrics, f"routing/{name}/dead_experts/max")) for name in modalities]
    return [(name, int(points[-1][1]), len(pools.choices[name])) for name, points in found if points]


def routing_charts(
    metrics: list[dict[str, Any]], intervals: Sequence[Interval], modalities: Sequence[str], pools: Pools | None
) -> list[LineChart]:
    """Charts of what was recorded; dead experts and score outside of the choice only if there ever was any."""

    def over_layers(key: str, worst: str = "max") -> list[Series]:
        series = []
        for index, name in enumerate(modalities):
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
    loads = _loads(intervals, modalities, pools) if pools else []
    charts = [
        line_chart("Expert load: busiest over the mean of the choice", loads, "1 is even"),
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


def _loads(intervals: Sequence[Interval], modalities: Sequence[str], pools: Pools) -> list[Series]:
    """Load of the busiest expert over the mean of the modality's choice: the mean over layers, and the worst layer."""
    series = []
    for index, name in enumerate(modalities):
        mean, worst = [], []
        for one in intervals:
            ratios = []
            for by_modality in one.layers.values():
                ratio = max_over_mean([by_modality[name].pairs[expert] for expert in pools.choices[name]])
                if ratio is not None:
                    ratios.append(ratio)
            if ratios:
                mean.append((one.step, sum(ratios) / len(ratios)))
                worst.append((one.step, max(ratios)))
        series.append(Series(f"{name}, mean over layers", mean, modality_color(index)))
        series.append(Series(f"{name}, worst layer", worst, modality_color(index), dash=True))
    return series
