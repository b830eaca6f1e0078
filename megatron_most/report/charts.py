"""Geometry of line charts: values in, coordinates in a drawing area of fixed size out. The templates draw them."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

WIDTH, HEIGHT = 560.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 14.0, 12.0, 32.0
MAX_POINTS = 240
"""More points than this would fall on the same pixels: means of neighbors are drawn instead."""

_MAX_MARKERS = 40

_LOG_RATIO = 25.0
"""Positive values that span more than this are drawn on a logarithmic scale."""

Marker = Literal["", "circle", "diamond", "square"]


@dataclass(frozen=True)
class Series:
    """A named curve.

    Args:
        label: its name in the legend.
        points: (step, value), ascending in step; of a chart by tokens, (tokens, value).
        color: index into the page's palette.
        dash: whether the line is dashed.
        marker: shape of every point, for points that are few and far apart such as those of validation; empty for none.
    """

    label: str
    points: Sequence[tuple[float, float]]
    color: int
    dash: bool = False
    marker: Marker = ""


@dataclass(frozen=True)
class Curve:
    """A series as it is drawn: ``points`` are (step, value, x, y)."""

    series: Series
    path: str
    points: list[tuple[float, float, float, float]]

    @property
    def marker(self) -> Marker:
        """Shape of every point: a single point is invisible without one, and too many would hide the curve."""
        if len(self.points) == 1:
            return self.series.marker or "circle"
        return self.series.marker if len(self.points) <= _MAX_MARKERS else ""

    @property
    def last(self) -> str:
        """The last value before any averaging."""
        return format_number(self.series.points[-1][1])


@dataclass(frozen=True)
class LineChart:
    """Everything the template needs; coordinates are in a ``WIDTH`` x ``HEIGHT`` view box.

    Args:
        averaged: how many logged lines a point is the mean of, at most.
        axis: what the x axis counts.
    """

    title: str
    unit: str
    curves: list[Curve]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    is_log: bool
    averaged: int
    axis: Literal["step", "tokens"] = "step"
    width: float = field(default=WIDTH, init=False)
    height: float = field(default=HEIGHT, init=False)
    left: float = field(default=LEFT, init=False)
    right: float = field(default=WIDTH - RIGHT, init=False)
    top: float = field(default=TOP, init=False)
    bottom: float = field(default=HEIGHT - BOTTOM, init=False)

    @property
    def description(self) -> str:
        """What the chart shows, in words."""
        parts = []
        for curve in self.curves:
            (first, start), (last, end) = curve.series.points[0], curve.series.points[-1]
            start_text = f"from {format_number(start)} at {self._where(first)} to " if last > first else ""
            parts.append(f"{curve.series.label} {start_text}{format_number(end)} at {self._where(last)}")
        return f"{self.title}: {'; '.join(parts)}"

    def _where(self, x: float) -> str:
        return f"step {x:g}" if self.axis == "step" else f"{format_number(x)} tokens"

    @property
    def script_data(self) -> dict[str, Any]:
        """What the page's script needs to answer a pointer and to write a CSV file.

        Points are (step or tokens, value, its text, x). Values have six digits.
        """
        return {
            "axis": self.axis,
            "width": self.width,
            "series": [
                {
                    "label": curve.series.label,
                    "color": curve.series.color,
                    "points": [
                        [round(step), float(f"{value:.6g}"), format_number(value), x]
                        for step, value, x, _ in curve.points
                    ],
                }
                for curve in self.curves
            ],
        }


@dataclass(frozen=True)
class Figure:
    """A chart by steps and, where tokens were logged, the same by tokens."""

    views: tuple[LineChart, ...]

    @property
    def title(self) -> str:
        return self.views[0].title


def figures(by_steps: Sequence[LineChart], by_tokens: Sequence[LineChart] = ()) -> list[Figure]:
    """Charts that may be shown by steps or by tokens.

    Args:
        by_tokens: charts of the same titles, laid out from points with tokens in place of steps.
    """
    others = {chart.title: dataclasses.replace(chart, axis="tokens") for chart in by_tokens}
    return [Figure((chart, others[chart.title]) if chart.title in others else (chart,)) for chart in by_steps]


def line_chart(title: str, series: Sequence[Series], unit: str = "", from_zero: bool = False) -> LineChart | None:
    """Lay out a chart; None if no series has a point.

    Args:
        from_zero: start the value axis at 0, for quantities of which the size matters, not the change.
    """
    shown = [one for one in series if one.points]
    if not shown:
        return None
    averaged = max(math.ceil(len(one.points) / MAX_POINTS) for one in shown)
    thinned = [average_points(one.points, MAX_POINTS) for one in shown]
    steps = [step for points in thinned for step, _ in points]
    values = [value for points in thinned for _, value in points]
    low_x, high_x = min(steps), max(steps)
    if high_x == low_x:
        margin = max(1.0, abs(low_x) / 1e9)  # 1 is lost in very large numbers
        low_x, high_x = low_x - margin, high_x + margin
    is_log = not from_zero and min(values) > 0 and max(values) / min(values) > _LOG_RATIO
    low_y, high_y, ticks = _log_axis(values) if is_log else _linear_axis(values, from_zero)

    def x_of(step: float) -> float:
        return round(LEFT + (step - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT), 1)

    def y_of(value: float) -> float:
        if is_log:  # differences of logarithms: quotients of floats may be infinite
            share = (math.log(value) - math.log(low_y)) / (math.log(high_y) - math.log(low_y))
        else:
            share = (value - low_y) / (high_y - low_y)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    curves = []
    for one, points in zip(shown, thinned, strict=True):
        placed = [(step, value, x_of(step), y_of(value)) for step, value in points]
        path = "M" + "L".join(f"{x:g} {y:g}" for _, _, x, y in placed)
        curves.append(Curve(one, path, placed))
    x_ticks = [(x_of(step), _short(step)) for step in nice_ticks(low_x, high_x, 6) if low_x <= step <= high_x]
    y_ticks = [(y_of(value), format_number(value)) for value in ticks]
    return LineChart(title, unit, curves, x_ticks, y_ticks, is_log, averaged)


def average_points(points: Sequence[tuple[float, float]], limit: int) -> list[tuple[float, float]]:
    """At most ``limit`` points: means of neighboring values, at the step of the last of them."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(len(points) / limit)
    buckets = [points[start : start + size] for start in range(0, len(points), size)]
    return [(bucket[-1][0], sum(value for _, value in bucket) / len(bucket)) for bucket in buckets]


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers that enclose ``low .. high`` (which differ)."""
    rough = (high - low) / count
    magnitude = 10 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def format_number(value: float) -> str:
    """Three significant digits, with k, M, G or T for thousands, and powers of ten for the very small."""
    size = abs(value)
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if suffix == 'k' else limit):.3g}{suffix}"
    if size >= 1000 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.3g}" if size >= 1e-4 else f"{value:.2e}".replace("e-0", "e-").replace(".00e", "e")


def _linear_axis(values: Sequence[float], from_zero: bool) -> tuple[float, float, list[float]]:
    low, high = min(values), max(values)
    if from_zero:
        low = min(low, 0.0)
    if high == low:
        margin = abs(high) / 2 or 1.0
        low, high = (low, high + margin) if from_zero else (low - margin, high + margin)
    ticks = nice_ticks(low, high, 4)
    return ticks[0], ticks[-1], ticks


def _log_axis(values: Sequence[float]) -> tuple[float, float, list[float]]:
    low, high = min(values) / 1.1, min(max(values), sys.float_info.max / 1.1) * 1.1
    first, last = math.floor(math.log10(low)), min(math.ceil(math.log10(high)), sys.float_info.max_10_exp)
    decades = math.log10(high) - math.log10(low)
    factors = (1, 2, 5) if decades < 2.5 else (1,)
    every = max(1, round(decades / 5))
    candidates = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
    return low, high, [value for value in candidates if low <= value <= high]


def _short(step: float) -> str:
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(step) >= limit:
            return f"{step / (1e3 if suffix == 'k' else limit):g}{suffix}"
    return f"{step:g}"
