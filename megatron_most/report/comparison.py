"""Several runs on one page: their curves in the same charts, their error rates, and how their settings differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_most.errors import ConfigError
from megatron_most.report.charts import LineChart, Marker, Series, figures, line_chart
from megatron_most.report.curves import MEMORY, PALETTE, RETENTION, points_of
from megatron_most.report.page import flatten, html_template, write_page
from megatron_most.report.run_files import RunFiles, read_run
from megatron_most.report.transcripts import SHORT_NAMES, Rate, error_rates
from megatron_most.report.utilization import FLOPS, MFU, with_utilization

_CURVES = ("lr", "grad_norm", "balance_loss", "tokens_per_second", MFU, FLOPS, MEMORY)
"""Metrics that are drawn beside all losses."""

_FROM_ZERO = ("lr", "tokens_per_second", MFU, FLOPS, MEMORY)

_OF_EVERY_RUN = ("run_dir", "command")
"""Settings that always differ."""


@dataclass(frozen=True)
class NamedRun:
    """A run with the label and color of its curves. Runs beyond the palette are dashed."""

    label: str
    color: int
    dash: bool
    files: RunFiles


def write_comparison(run_dirs: Sequence[str | Path], output: str | Path) -> Path:
    """Render the comparison of several runs to ``output`` and return its path.

    Raises:
        DataError: one of them is no run directory.
        ConfigError: fewer than two runs, a run named twice, or ``output`` cannot be written.
    """
    directories = [Path(one).absolute() for one in run_dirs]
    for index, directory in enumerate(directories):
        if directory in directories[:index]:
            raise ConfigError(f"{directory}: named twice; a comparison needs different runs")
    if len(directories) < 2:
        raise ConfigError(f"a comparison needs at least 2 runs, got {len(directories)}")
    write_page(output, render_comparison([read_run(one) for one in directories]))
    return Path(output)


def render_comparison(runs: Sequence[RunFiles]) -> str:
    """The page as HTML."""
    labels = _labels([run.directory for run in runs])
    named = [
        NamedRun(label, index % PALETTE, index >= PALETTE, with_utilization(run))
        for index, (label, run) in enumerate(zip(labels, runs, strict=True))
    ]
    by_tokens = [
        NamedRun(one.label, one.color, one.dash, files) for one in named if (files := one.files.by_tokens()) is not None
    ]
    charts = figures(_charts(named), _charts(by_tokens))
    return html_template("comparison.html").render(
        runs=named,
        charts=charts,
        has_tokens=any(len(figure.views) > 1 for figure in charts),
        rates=_rates(named),
        differences=_differences(named),
        notes=[f"{one.label}: {note}" for one in named for note in one.files.notes],
    )


def _labels(directories: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell all runs apart."""
    for length in range(1, max(len(one.parts) for one in directories) + 1):
        labels = ["/".join(one.parts[-length:]) for one in directories]
        if len(set(labels)) == len(labels):
            return labels
    return [str(one) for one in directories]


def _charts(runs: Sequence[NamedRun]) -> list[LineChart]:
    """A chart for each loss and each of :data:`_CURVES` that any run has."""
    keys = dict.fromkeys(key for one in runs for line in one.files.metrics for key in line)
    losses = [key for key in keys if key == "loss" or key.startswith("loss/")]
    losses += [key for key in keys if (key.startswith("validation/") and key.endswith("/loss")) or key == RETENTION]
    charts = []
    for key in (*losses, *_CURVES):
        marker: Marker = "circle" if key.startswith("validation/") or key == RETENTION else ""
        series = [Series(one.label, points_of(one.files.metrics, key), one.color, one.dash, marker) for one in runs]
        charts.append(line_chart(key, series, from_zero=key in _FROM_ZERO))
    return [chart for chart in charts if chart]


def _rates(runs: Sequence[NamedRun]) -> list[tuple[str, list[Rate | None]]]:
    """For each suite and set its name and the rate of each run."""
    found: dict[str, list[Rate | None]] = {}
    for index, one in enumerate(runs):
        suites, rows = error_rates(one.files)
        for set_name, rates in rows:
            for suite, rate in zip(suites, rates, strict=True):
                name = f"{SHORT_NAMES.get(suite, suite)}: {set_name}"
                if rate is not None:
                    found.setdefault(name, [None] * len(runs))[index] = rate
    return sorted(found.items())


def _differences(runs: Sequence[NamedRun]) -> list[tuple[str, list[str]]]:
    """Keys of configuration and environment that differ, with their value in each run."""
    settings = [dict([*flatten(one.files.config), *flatten(one.files.environment)]) for one in runs]
    keys = dict.fromkeys(key for one in settings for key in one if key not in _OF_EVERY_RUN)
    rows = [(key, [one.get(key, "–") for one in settings]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]
