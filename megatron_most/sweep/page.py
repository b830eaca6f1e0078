"""The sweep's tables and its page: one HTML file without any outside resource."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import jinja2

from megatron_most import __version__
from megatron_most.files import write_text
from megatron_most.report.charts import LineChart, Series, format_number, line_chart
from megatron_most.report.curves import PALETTE, points_of
from megatron_most.report.routing import RoutingView, routing_view
from megatron_most.sweep.intervals import Estimate, estimate, paired_difference
from megatron_most.sweep.plan import PlannedRun
from megatron_most.sweep.results import RunResult, collect, metric_names, write_tables
from megatron_most.sweep.spec import Sweep, Variant

_WIDTH, _LEFT, _RIGHT, _ROW, _TOP = 560.0, 210.0, 20.0, 24.0, 14.0


@dataclass(frozen=True)
class VariantSummary:
    """A variant over its seeds. ``estimates`` and ``differences`` (from the baseline) by metric, None where missing."""

    variant: Variant
    color: int
    is_baseline: bool
    results: list[RunResult]
    tokens: float | None
    estimates: dict[str, Estimate | None]
    differences: dict[str, Estimate | None]

    @property
    def num_finished(self) -> int:
        return sum(result.state == "finished" for result in self.results)


def summarize(sweep: Sweep, results: list[RunResult]) -> tuple[list[str], list[VariantSummary]]:
    """Names of the metrics, and each variant's means and paired differences."""
    metrics = metric_names(sweep, results)
    groups: dict[Variant, list[RunResult]] = {}
    for result in results:
        groups.setdefault(result.run.variant, []).append(result)

    def by_seed(members: list[RunResult], metric: str) -> dict[int, float]:
        return {result.run.seed: result.metrics[metric] for result in members if metric in result.metrics}

    baseline = next(members for variant, members in groups.items() if variant.choices == sweep.baseline.choices)
    summaries = []
    for index, (variant, members) in enumerate(groups.items()):
        is_baseline = members is baseline
        tokens = [result.tokens for result in members if result.state == "finished" and result.tokens]
        summaries.append(
            VariantSummary(
                variant,
                index % PALETTE,
                is_baseline,
                members,
                sum(tokens) / len(tokens) if tokens else None,
                {metric: estimate(list(by_seed(members, metric).values())) for metric in metrics},
                {
                    metric: None
                    if is_baseline
                    else paired_difference(by_seed(members, metric), by_seed(baseline, metric))
                    for metric in metrics
                },
            )
        )
    return metrics, summaries


def write_results(sweep: Sweep, runs: list[PlannedRun]) -> list[Path]:
    """Write ``results.parquet``, ``results.csv``, ``results.md`` and ``sweep.html``; returns their paths.

    Raises:
        DataError: the sweep names a metric that no run has.
        ConfigError: a file cannot be written.
    """
    directory = Path(sweep.spec.output)
    results = collect(sweep, runs)
    metrics, summaries = summarize(sweep, results)
    paths = write_tables(sweep, results, directory)
    for name, text in (("results.md", markdown(sweep, metrics, summaries)), ("sweep.html", render(sweep, results))):
        write_text(directory / name, text)
        paths.append(directory / name)
    return paths


def markdown(sweep: Sweep, metrics: list[str], summaries: list[VariantSummary]) -> str:
    """The two tables of the page for a document: means, and differences from the baseline."""
    heads = ["variant", "seeds", "parameters", "active", "GFLOP a token", "tokens", *metrics]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for one in summaries:
        run = one.results[0].run
        cells = [
            _label(one),
            f"{one.num_finished} of {len(one.results)}",
            f"{run.parameters:,}",
            f"{run.active_parameters:,}",
            f"{run.flops / 1e9:.4g}",
            "" if one.tokens is None else f"{one.tokens:,.0f}",
            *(_interval(one.estimates[metric]) for metric in metrics),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"| difference from {sweep.baseline.name} | {' | '.join(metrics)} |",
        f"|{'---|' * (1 + len(metrics))}",
    ]
    for one in summaries:
        if not one.is_baseline:
            cells = [one.variant.name, *(_difference(one.differences[metric]) for metric in metrics)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def render(sweep: Sweep, results: list[RunResult]) -> str:
    """The page as HTML. Everything from the runs' files is escaped."""
    metrics, summaries = summarize(sweep, results)
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader("megatron_most.sweep"), jinja2.PackageLoader("megatron_most.report")]
        ),
        autoescape=lambda name: name is not None and name.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda value: f"{value:.1%}"
    environment.globals["zip"] = zip
    environment.globals |= {"interval": _interval, "difference": _difference, "label": _label}
    spec = sweep.spec
    states = [result.state for result in results]
    facts = [f"{len(results)} runs", *(f"{states.count(kind)} {kind}" for kind in dict.fromkeys(states))]
    facts += [f"seeds {', '.join(map(str, spec.seeds))}", f"budget: {spec.budget.match.replace('_', ' ')}"]
    return environment.get_template("sweep.html").render(
        name=spec.name,
        facts=facts,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        version=__version__,
        metrics=metrics,
        summaries=summaries,
        baseline=sweep.baseline,
        dots=[dots for metric in metrics if (dots := _dots(metric, summaries))],
        curves=_curves(metrics, summaries),
        routing=[(one, view) for one in summaries if (view := _routing(one))],
        failures=[result for result in results if result.error],
        results=results,
    )


@dataclass(frozen=True)
class Dots:
    """A metric's chart: each variant a row with the interval of its mean and a dot for each seed."""

    metric: str
    height: float
    ticks: list[tuple[float, str]]
    rows: list[tuple[VariantSummary, float, float, float, float, list[tuple[float, str]]]]
    width: float = _WIDTH
    left: float = _LEFT


def _dots(metric: str, summaries: list[VariantSummary]) -> Dots | None:
    """Rows are (variant, y, x of the mean, of the interval's ends, (x, text) of each seed)."""
    shown = [one for one in summaries if one.estimates[metric]]
    values = [result.metrics[metric] for one in shown for result in one.results if metric in result.metrics]
    ends = [
        one.estimates[metric].mean + sign * one.estimates[metric].half_width
        for one in shown
        for sign in (-1, 1)
        if math.isfinite(one.estimates[metric].half_width)
    ]
    if not values:
        return None
    low, high = min(values + ends), max(values + ends)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = low - margin, high + margin

    def x_of(value: float) -> float:
        return round(_LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT), 1)

    rows = []
    for index, one in enumerate(shown):
        mean = one.estimates[metric]
        reach = mean.half_width if math.isfinite(mean.half_width) else 0.0
        seeds = [
            (x_of(result.metrics[metric]), f"seed {result.run.seed}: {format_number(result.metrics[metric])}")
            for result in one.results
            if metric in result.metrics
        ]
        y = _TOP + _ROW * (index + 0.5)
        rows.append((one, y, x_of(mean.mean), x_of(mean.mean - reach), x_of(mean.mean + reach), seeds))
    ticks = [(x_of(value), format_number(value)) for value in (low + margin, (low + high) / 2, high - margin)]
    return Dots(metric, _TOP + _ROW * len(shown) + 26, ticks, rows)


def _curves(metrics: list[str], summaries: list[VariantSummary]) -> list[LineChart]:
    """Training loss and the metrics that are logged over training: the mean over the seeds that have the step."""
    charts = []
    for metric in dict.fromkeys(["loss", *(metric for metric in metrics if metric.startswith("validation/"))]):
        series = []
        for one in summaries:
            by_step: dict[float, list[float]] = {}
            for result in one.results:
                for step, value in points_of(result.files.metrics, metric) if result.files else []:
                    by_step.setdefault(step, []).append(value)
            points = [(step, sum(values) / len(values)) for step, values in sorted(by_step.items())]
            marker = "circle" if metric.startswith("validation/") else ""
            series.append(Series(one.variant.name, points, one.color, dash=one.is_baseline, marker=marker))
        charts.append(line_chart(metric, series))
    return [chart for chart in charts if chart]


def _routing(one: VariantSummary) -> RoutingView | None:
    """Maps of the first seed that has any."""
    return next((view for result in one.results if result.files and (view := routing_view(result.files))), None)


def _label(one: VariantSummary) -> str:
    return f"{one.variant.name}{' (baseline)' if one.is_baseline else ''}"


def _interval(value: Estimate | None) -> str:
    if value is None:
        return "–"
    if not math.isfinite(value.half_width):
        return format_number(value.mean)
    return f"{format_number(value.mean)} ± {value.half_width:.2g}"


def _difference(value: Estimate | None) -> str:
    """With its sign; bold-faced words say when it is beyond noise."""
    if value is None:
        return "–"
    text = f"{value.mean:+.3g}"
    if not math.isfinite(value.half_width):
        return text
    return f"{text} ± {value.half_width:.2g}{', beyond noise' if value.is_beyond_noise else ''}"
