"""The report: what a run directory holds, laid out and rendered as one HTML file without any outside resource."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from megatron_most import __version__
from megatron_most.files import write_text
from megatron_most.report.charts import format_number
from megatron_most.report.curves import loss_charts, points_of, training_charts
from megatron_most.report.routing import routing_view
from megatron_most.report.run_files import RunFiles, number, read_run
from megatron_most.report.samples import KINDS, speech_samples
from megatron_most.report.transcripts import SHORT_NAMES, error_rates, transcript_tables

_HEADLINES = (
    ("asr_wer_heldout", "ASR word error rate", "percent"),
    ("asr_wer_heldout_hard", "ASR word error rate, hard set", "percent"),
    ("asr_wer_untrained", "ASR before training", "percent"),
    ("tts_wer_heldout", "TTS word error rate", "percent"),
    ("tts_wer_heldout_hard", "TTS word error rate, hard set", "percent"),
    ("codec_roundtrip_wer", "the recognizer on the codec round trip", "percent"),
    ("original_wer", "the recognizer on the originals", "percent"),
    ("train_seconds", "training time", "duration"),
    ("tokens_per_second", "tokens per second", "number"),
    ("tokens_outside_group", "pairs routed outside their group", "count"),
    ("parameters_total", "parameters", "number"),
    ("parameters_active", "parameters active per token", "number"),
)

_LATEST_TIME = 1e11
"""Unix times beyond this are no times."""


def write_report(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Render the report of ``run_dir`` to ``output`` (default: ``run_dir/report.html``) and return its path.

    Raises:
        DataError: no such run directory, or nothing of a run in it.
        ConfigError: ``output`` cannot be written.
    """
    run = read_run(run_dir)
    output = Path(output) if output is not None else run.directory / "report.html"
    write_text(output, render(run))
    return output


def render(run: RunFiles) -> str:
    """The page as HTML. Everything from the run's files is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("megatron_most.report"),
        autoescape=lambda name: name is not None and name.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    environment.globals["zip"] = zip
    suites, rates = error_rates(run)
    context = {
        "name": run.directory.absolute().name,
        "made": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "version": __version__,
        "facts": _facts(run),
        "headlines": _headlines(run),
        "summary": _flatten(run.summary),
        "loss_charts": loss_charts(run.metrics, run.modalities),
        "training_charts": training_charts(run.metrics),
        "routing": routing_view(run),
        "suites": [SHORT_NAMES.get(suite, suite) for suite in suites],
        "rates": rates,
        "tables": transcript_tables(run),
        "samples": speech_samples(run),
        "kinds": KINDS,
        "config_text": run.config_text,
        "environment": _flatten(run.environment),
    }
    # Laying out the sections adds notes of its own, so the notes come last.
    return environment.get_template("report.html").render(context, notes=run.notes)


def _headlines(run: RunFiles) -> list[tuple[str, str]]:
    """Label and text of the numbers at the top: the summary's, else what the metrics alone say."""
    texts = {
        "percent": _percent,
        "count": lambda value: f"{value:,.0f}",
        "number": format_number,
        "duration": _duration,
    }
    found = [
        (label, texts[kind](value))
        for key, label, kind in _HEADLINES
        if (value := number(run.summary.get(key))) is not None
    ]
    losses = points_of(run.metrics, "loss")
    if not found and losses:
        speed = [value for _, value in points_of(run.metrics, "tokens_per_second")]
        tokens = points_of(run.metrics, "consumed_tokens")
        found = [
            ("loss at the first line", format_number(losses[0][1])),
            ("loss at the last line", format_number(losses[-1][1])),
        ]
        found += [("tokens seen", format_number(tokens[-1][1]))] if tokens else []
        found += [("tokens per second, mean", format_number(sum(speed) / len(speed)))] if speed else []
    return found


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


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Dotted key and text of every value; a list of words (a command) becomes one line."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += _flatten(value, f"{prefix}{key}.")
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
