"""The sweep's tables and its page: one HTML file that loads nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from megatron_most.files import write_text
from megatron_most.report.charts import Figure, Marker, Series, figures, format_number, line_chart
from megatron_most.report.curves import PALETTE, points_of
from megatron_most.report.page import html_template
from megatron_most.report.routing import RoutingView, routing_view
from megatron_most.sweep.intervals import Estimate, estimate, paired_difference
from megatron_most.sweep.plan import PlannedRun
from megatron_most.sweep.results import RunResult, collect, metric_names, write_tables
from megatron_most.sweep.spec import Sweep, Variant

_WIDTH, _LEFT, _RIGHT, _ROW, _TOP = 560.0, 210.0, 20.0, 24.0, 14.0


@dataclass(frozen=True)
class VariantSummary:
    """A variant over its seeds.

    Args:
        tokens: mean over the finished runs.
        estimates, differences: by metric; None where there is no value. Differences are from the baseline.
    """

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
                {metric: estimate(list(_by_seed(members, metric).values())) for metric in metrics},
                {
                    metric: None
                    if is_baseline
                    else paired_difference(_by_seed(members, metric), _by_seed(baseline, metric))
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
    heads = ["variant", "seeds", "parameters", "active", "GFLOP per token", "tokens", *metrics]
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
    """The page as HTML."""
    metrics, summaries = summarize(sweep, results)
    spec = sweep.spec
    states = [result.state for result in results]
    facts = [f"{len(results)} runs", *(f"{states.count(kind)} {kind}" for kind in dict.fromkeys(states))]
    facts += [f"seeds {', '.join(map(str, spec.seeds))}", f"budget: {spec.budget.match.replace('_', ' ')}"]
    return html_template("sweep.html", "megatron_most.sweep").render(
        interval=_interval,
        difference=_difference,
        label=_label,
        name=spec.name,
        facts=facts,
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
class DotRow:
    """A variant in a metric's chart: x of its mean, of the ends of the interval, and of each seed with a text."""

    variant: VariantSummary
    text: str
    y: float
    mean: float
    low: float
    high: float
    seeds: list[tuple[float, str]]


@dataclass(frozen=True)
class Dots:
    """A metric's chart: the interval of each variant's mean and a dot for each seed.

    table: the same in numbers, for a CSV file.
    """

    metric: str
    height: float
    ticks: list[tuple[float, str]]
    rows: list[DotRow]
    table: dict[str, list]
    width: float = _WIDTH
    left: float = _LEFT


def _dots(metric: str, summaries: list[VariantSummary]) -> Dots | None:
    shown = [(one, mean) for one in summaries if (mean := one.estimates[metric]) is not None]
    if not shown:
        return None
    seeds = [_by_seed(one.results, metric) for one, _ in shown]
    # A single value has no interval.
    reaches = [mean.half_width if math.isfinite(mean.half_width) else 0.0 for _, mean in shown]
    values = [value for known in seeds for value in known.values()]
    values += [mean.mean + sign * reach for (_, mean), reach in zip(shown, reaches, strict=True) for sign in (-1, 1)]
    low, high = min(values), max(values)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = low - margin, high + margin

    def x_of(value: float) -> float:
        return round(_LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT), 1)

    rows, table = [], []
    for index, ((one, mean), reach, known) in enumerate(zip(shown, reaches, seeds, strict=True)):
        dots = [(x_of(value), f"seed {seed}: {format_number(value)}") for seed, value in known.items()]
        ends = mean.mean - reach, mean.mean + reach
        y = _TOP + _ROW * (index + 0.5)
        rows.append(DotRow(one, _interval(mean), y, x_of(mean.mean), x_of(ends[0]), x_of(ends[1]), dots))
        table += [[one.variant.name, f"seed {seed}", value, "", ""] for seed, value in known.items()]
        table.append([one.variant.name, "mean", mean.mean, *(ends if reach else ("", ""))])
    ticks = [(x_of(value), format_number(value)) for value in (low + margin, (low + high) / 2, high - margin)]
    columns = ["variant", "what", metric, "95% interval from", "to"]
    return Dots(metric, _TOP + _ROW * len(shown) + 26, ticks, rows, {"columns": columns, "rows": table})


def _by_seed(results: list[RunResult], metric: str) -> dict[int, float]:
    return {result.run.seed: result.metrics[metric] for result in results if metric in result.metrics}


def _curves(metrics: list[str], summaries: list[VariantSummary]) -> list[Figure]:
    """Training loss and the metrics that are logged over training: means over the seeds that have the step."""
    charts = []
    for metric in dict.fromkeys(["loss", *(metric for metric in metrics if metric.startswith("validation/"))]):
        series = []
        for one in summaries:
            by_step: dict[float, list[float]] = {}
            for result in one.results:
                for step, value in points_of(result.files.metrics, metric) if result.files else []:
                    by_step.setdefault(step, []).append(value)
            points = [(step, sum(values) / len(values)) for step, values in sorted(by_step.items())]
            marker: Marker = "circle" if metric.startswith("validation/") else ""
            series.append(Series(one.variant.name, points, one.color, dash=one.is_baseline, marker=marker))
        charts.append(line_chart(metric, series))
    return figures([chart for chart in charts if chart])


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
    """With its sign, and whether it is beyond noise."""
    if value is None:
        return "–"
    text = f"{value.mean:+.3g}"
    if not math.isfinite(value.half_width):
        return text
    return f"{text} ± {value.half_width:.2g}{', beyond noise' if value.is_beyond_noise else ''}"
