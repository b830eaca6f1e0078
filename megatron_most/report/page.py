"""The report: one HTML file that shows what a run directory holds and loads nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from megatron_most import __version__
from megatron_most.files import write_text
from megatron_most.report.charts import Figure, LineChart, figures, format_number
from megatron_most.report.curves import MEMORY, loss_charts, points_of, training_charts
from megatron_most.report.routing import routing_view
from megatron_most.report.run_files import RunFiles, number, read_run
from megatron_most.report.samples import KINDS, speech_samples
from megatron_most.report.scores import suite_scores
from megatron_most.report.transcripts import SHORT_NAMES, error_rates, transcript_tables
from megatron_most.report.utilization import FLOPS, MFU, with_utilization

_HEADLINES = {
    "Results": (
        ("asr_wer_heldout", "ASR word error rate", "percent"),
        ("asr_wer_heldout_hard", "ASR word error rate, hard set", "percent"),
        ("tts_wer_heldout", "TTS word error rate", "percent"),
        ("tts_wer_heldout_hard", "TTS word error rate, hard set", "percent"),
    ),
    "For comparison": (
        ("asr_wer_untrained", "ASR word error rate before training", "percent"),
        ("codec_roundtrip_wer", "the recognizer on the codec round trip", "percent"),
        ("original_wer", "the recognizer on the originals", "percent"),
    ),
    "Training": (
        ("train_seconds", "training time", "duration"),
        ("tokens_per_second", "tokens per second", "number"),
        ("tokens_outside_group", "pairs routed outside their group", "count"),
        ("parameters_total", "parameters", "number"),
        ("parameters_active", "parameters active per token", "number"),
    ),
}
"""Numbers of ``summary.json`` at the top of the page, in groups: key, label and format."""

_LATEST_TIME = 1e11
"""Later Unix times (the year 5138) are broken values."""


def write_report(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Render the report of ``run_dir`` to ``output`` (default: ``run_dir/report.html``) and return its path.

    Raises:
        DataError: no such run directory, or it holds none of a run's files.
        ConfigError: ``output`` cannot be written.
    """
    run = read_run(run_dir)
    output = Path(output) if output is not None else run.directory / "report.html"
    write_page(output, render(run))
    return output


def write_page(path: str | Path, page: str) -> None:
    """Write HTML. Half surrogate pairs, which JSON can hold and UTF-8 cannot, are written as escapes."""
    write_text(path, page.encode("utf-8", "backslashreplace").decode())


def render(run: RunFiles) -> str:
    """The page as HTML."""
    run = with_utilization(run)
    by_tokens = run.by_tokens()
    suites, rates = error_rates(run)
    routing = routing_view(run)
    context = {
        "name": run.directory.absolute().name,
        "facts": _facts(run),
        "headlines": _headlines(run),
        "summary": flatten(run.summary),
        "has_tokens": by_tokens is not None,
        "loss_charts": _figures(run, by_tokens, lambda one: loss_charts(one.metrics, one.modalities)),
        "training_charts": _figures(run, by_tokens, lambda one: training_charts(one.metrics)),
        "routing": routing,
        "routing_charts": _figures(run, by_tokens, _routing_charts) if routing else [],
        "suites": [SHORT_NAMES.get(suite, suite) for suite in suites],
        "rates": rates,
        "scores": suite_scores(run),
        "tables": transcript_tables(run),
        "samples": speech_samples(run),
        "kinds": KINDS,
        "config_text": run.config_text,
        "environment": flatten(run.environment),
    }
    # Laying out the sections adds notes of its own, so the notes come last.
    return html_template("report.html").render(context, notes=run.notes)


def html_template(name: str, *packages: str) -> jinja2.Template:
    """A template that escapes everything it is given, from ``packages`` or from the report."""
    environment = jinja2.Environment(  # nosec B701
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(one) for one in (*packages, "megatron_most.report")]),
        autoescape=lambda name: name is not None and name.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    environment.globals |= {
        "zip": zip,
        "made": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "version": __version__,
    }
    return environment.get_template(name)


def _figures(
    run: RunFiles, by_tokens: RunFiles | None, charts: Callable[[RunFiles], Sequence[LineChart]]
) -> list[Figure]:
    return figures(charts(run), charts(by_tokens) if by_tokens else ())


def _routing_charts(run: RunFiles) -> Sequence[LineChart]:
    view = routing_view(run)
    return view.charts if view else ()


def _headlines(run: RunFiles) -> list[tuple[str, list[tuple[str, str]]]]:
    """Groups of (label, text) for the top of the page: the summary, then speed and memory from the metrics."""
    texts = {
        "percent": _percent,
        "count": lambda value: f"{value:,.0f}",
        "number": format_number,
        "duration": _duration,
    }
    groups = {
        title: [
            (label, texts[kind](value))
            for key, label, kind in entries
            if (value := number(run.summary.get(key))) is not None
        ]
        for title, entries in _HEADLINES.items()
    }
    if not any(groups.values()) and (losses := points_of(run.metrics, "loss")):
        groups["Training"] = [
            ("loss at the first line", format_number(losses[0][1])),
            ("loss at the last line", format_number(losses[-1][1])),
        ]
        for key, label in (("consumed_tokens", "tokens seen"), ("tokens_per_second", "tokens per second, last")):
            if points := points_of(run.metrics, key):
                groups["Training"].append((label, format_number(points[-1][1])))
    for key, label, text in (
        (MFU, "model FLOPs utilization, last", lambda value: f"{value:.1f}%"),
        (FLOPS, "model FLOP/s, last", format_number),
        (MEMORY, "peak memory of rank 0", lambda value: f"{value / (1 << 30):.2f} GiB"),
    ):
        if points := points_of(run.metrics, key):
            groups["Training"].append((label, text(points[-1][1])))
    return [(title, entries) for title, entries in groups.items() if entries]


def _facts(run: RunFiles) -> list[str]:
    """The line under the title: device, ranks, steps, when."""
    environment = run.environment
    facts = [str(environment["device"])] if "device" in environment else []
    if number(environment.get("world_size")):
        ranks = int(environment["world_size"])
        facts.append(f"{ranks} rank{'s' if ranks > 1 else ''}")
    if run.metrics:
        facts.append(f"{max(line['step'] for line in run.metrics):,.0f} steps")
    times = [value for line in run.metrics if (value := number(line.get("time"))) and 0 < value < _LATEST_TIME]
    if times:
        facts.append(datetime.fromtimestamp(times[0]).astimezone().strftime("started %Y-%m-%d %H:%M"))
    return facts


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Dotted key and text of every value; a list becomes one line."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            rows.append((f"{prefix}{key}", " ".join(map(str, value))))
        else:
            rows.append((f"{prefix}{key}", f"{value:.6g}" if isinstance(value, float) else str(value)))
    return rows


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
