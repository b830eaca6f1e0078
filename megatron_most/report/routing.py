"""Where the tokens went: a map of layers by experts for each modality, and how evenly each group's experts were used.

Shape letters: L MoE layers, E logical experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_most.report.charts import LineChart, Series, line_chart
from megatron_most.report.curves import points_of
from megatron_most.report.run_files import RunFiles, number
from megatron_most.vocab import MODALITY_NAMES

_FINAL_SHARE = 0.25
"""The map shows the last quarter of the intervals: what training has arrived at, over enough tokens to be steady."""

_ROW = 26.0
_LABELS = 64.0
_LOADS = 58.0
_HEAD = 24.0
_FOOT = 22.0


@dataclass(frozen=True)
class Cell:
    """One expert of one layer: the share of the modality's pairs, and whether it lies outside the modality's group."""

    layer: int
    name: str
    x: float
    y: float
    width: float
    height: float
    pairs: int
    share: float
    strength: float
    is_outside: bool

    @property
    def title(self) -> str:
        where = ", outside the group" if self.is_outside else ""
        return f"layer {self.layer}, {self.name}{where}: {self.share:.2%} ({self.pairs:,} pairs)"


@dataclass(frozen=True)
class RoutingMap:
    """One modality's heat map; coordinates are in a ``width`` x ``height`` view box."""

    modality: str
    num_experts: int
    color: int
    cells: list[Cell]
    rows: list[tuple[int, float, str]]
    borders: list[float]
    heads: list[tuple[str, float]]
    columns: list[tuple[str, float]]
    width: float
    height: float
    top: float
    bottom: float
    highest: float
    even: float | None
    show_values: bool

    @property
    def description(self) -> str:
        return (
            f"Routing map of {self.modality} tokens: {len(self.rows)} layers by {self.num_experts} experts,"
            f" largest share {self.highest:.1%}"
        )


@dataclass(frozen=True)
class RoutingView:
    """The routing section of the page."""

    maps: list[RoutingMap]
    charts: list[LineChart]
    first_step: int
    last_step: int
    pairs: int
    outside: int

    @property
    def is_wide(self) -> bool:
        """Whether a map needs the page's full width."""
        return any(one.num_experts > 16 for one in self.maps)


def routing_view(run: RunFiles) -> RoutingView | None:
    """Lay out the routing section; None when there are no counts that can be used (with a note, if there were any)."""
    entries = [(int(line["step"]), _layers(line)) for line in run.routing]
    if not entries:
        return None
    width = max(
        (len(counts) for _, layers in entries for _, by_name in layers for counts in by_name.values()), default=0
    )
    usable = [
        (step, [layer for layer in layers if all(len(counts) == width for counts in layer[1].values())])
        for step, layers in entries
    ]
    entries = [(step, layers) for step, layers in usable if layers]
    if len(entries) < len(run.routing):
        run.notes.append(f"{len(run.routing) - len(entries)} lines of routing.jsonl hold no counts and are left out.")
    if not entries or not width:
        return None
    groups = run.groups
    if sum(size for _, size in groups) != width:
        groups = []
        run.notes.append("The sizes of the expert groups are unknown, so the routing maps show no borders.")

    final = entries[-max(1, round(len(entries) * _FINAL_SHARE)) :]
    totals = _sum(layers for _, layers in final)
    maps = [_map(name, index, totals, groups, width) for index, name in enumerate(MODALITY_NAMES)]
    everything = _sum(layers for _, layers in entries)
    pairs = sum(sum(counts) for by_name in everything.values() for counts in by_name.values())
    outside = sum(int(number(layer.get("outside_group")) or 0) for line in run.routing for layer in _dicts(line))
    charts = [_load_chart(entries, groups)] if groups else []
    charts.append(
        line_chart(
            "Balance loss, before its coefficient",
            [Series("mean over layers (1 is even)", points_of(run.metrics, "balance_loss"), 6)],
        )
    )
    return RoutingView(
        [one for one in maps if one],
        [chart for chart in charts if chart],
        final[0][0],
        final[-1][0],
        pairs,
        outside,
    )


def _dicts(line: dict[str, Any]) -> list[dict[str, Any]]:
    layers = line.get("layers")
    return [layer for layer in layers if isinstance(layer, dict)] if isinstance(layers, list) else []


def _layers(line: dict[str, Any]) -> list[tuple[int, dict[str, list[int]]]]:
    """Layer number and pairs ``[E]`` of each modality, for every layer of a line that holds whole counts."""
    found = []
    for layer in _dicts(line):
        counts = {name: layer.get(name) for name in MODALITY_NAMES}
        if all(
            isinstance(row, list) and row and all(number(value) is not None for value in row) for row in counts.values()
        ):
            found.append(
                (int(number(layer.get("layer")) or 0), {name: [int(v) for v in counts[name]] for name in counts})
            )
    return found


def _sum(intervals: Any) -> dict[int, dict[str, list[int]]]:
    """Pairs of all intervals by layer and modality."""
    totals: dict[int, dict[str, list[int]]] = {}
    for layers in intervals:
        for number_, by_name in layers:
            mine = totals.setdefault(number_, {name: [0] * len(row) for name, row in by_name.items()})
            for name, row in by_name.items():
                mine[name] = [a + b for a, b in zip(mine[name], row, strict=True)]
    return dict(sorted(totals.items()))


def _range(groups: Sequence[tuple[str, int]], modality: str) -> range | None:
    """Logical experts of a modality's group; None when the groups are unknown."""
    start = 0
    for name, size in groups:
        if name == modality:
            return range(start, start + size)
        start += size
    return None


def _map(
    modality: str, color: int, totals: dict[int, dict[str, list[int]]], groups: list[tuple[str, int]], width: int
) -> RoutingMap | None:
    sums = {layer: sum(by_name[modality]) for layer, by_name in totals.items()}
    if not any(sums.values()):
        return None
    mine = _range(groups, modality)
    cell_width = max(13.0, min(46.0, 420.0 / width))
    shares = {layer: [count / (sums[layer] or 1) for count in by_name[modality]] for layer, by_name in totals.items()}
    highest = max(max(row) for row in shares.values())
    names = [f"{group} expert {index}" for group, size in groups for index in range(size)]
    names = names or [f"expert {index}" for index in range(width)]

    cells, rows = [], []
    for row, (layer, by_name) in enumerate(totals.items()):
        y = _HEAD + row * _ROW
        loads = [by_name[modality][index] for index in mine] if mine is not None else by_name[modality]
        rows.append((layer, y + _ROW / 2, _load_text(loads)))
        for index, share in enumerate(shares[layer]):
            x = _LABELS + index * cell_width
            is_outside = mine is not None and index not in mine
            cells.append(
                Cell(
                    layer,
                    names[index],
                    x,
                    y,
                    cell_width,
                    _ROW,
                    by_name[modality][index],
                    share,
                    round(share / highest, 3),
                    is_outside,
                )  # fmt: skip
            )
    ends = [sum(size for _, size in groups[: index + 1]) for index in range(len(groups))]
    starts = [end - size for end, (_, size) in zip(ends, groups, strict=True)]
    every = 1 if cell_width >= 18 else 8
    return RoutingMap(
        modality=modality,
        num_experts=width,
        color=color,
        cells=cells,
        rows=rows,
        borders=[_LABELS + end * cell_width for end in ends[:-1]],
        heads=[
            (f"{name} experts", _LABELS + (start + end) / 2 * cell_width)
            for (name, _), start, end in zip(groups, starts, ends, strict=True)
        ],
        columns=[
            (
                str(index - next((start for start in reversed(starts) if start <= index), 0)),
                _LABELS + (index + 0.5) * cell_width,
            )
            for index in range(width)
            if index % every == 0
        ],
        width=_LABELS + width * cell_width + _LOADS,
        height=_HEAD + len(rows) * _ROW + _FOOT,
        top=_HEAD,
        bottom=_HEAD + len(rows) * _ROW,
        highest=highest,
        even=1 / len(mine) if mine else None,
        show_values=cell_width >= 30,
    )


def _load_text(loads: Sequence[int]) -> str:
    ratio = _max_over_mean(loads)
    return f"{ratio:.2f}×" if ratio else "–"


def _max_over_mean(loads: Sequence[int]) -> float | None:
    """Load of the busiest expert over the mean; None when nothing was routed."""
    return max(loads) * len(loads) / sum(loads) if sum(loads) else None


def _load_chart(entries: list[tuple[int, list]], groups: list[tuple[str, int]]) -> LineChart | None:
    """Busiest expert over the group's mean at each step: the mean over layers, and the worst layer."""
    series = []
    for color, modality in enumerate(MODALITY_NAMES):
        mine = _range(groups, modality)
        mean, worst = [], []
        for step, layers in entries:
            ratios = [_max_over_mean([by_name[modality][index] for index in mine]) for _, by_name in layers]
            ratios = [ratio for ratio in ratios if ratio]
            if ratios:
                mean.append((step, sum(ratios) / len(ratios)))
                worst.append((step, max(ratios)))
        series += [Series(f"{modality}, mean over layers", mean, color)]
        series += [Series(f"{modality}, worst layer", worst, color, dash=True)]
    return line_chart("Expert load: busiest expert over the mean of its group", series, unit="1 is even")
