"""Results of a sweep: one row per run, in memory, as Parquet and as CSV."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet

from megatron_most.errors import DataError
from megatron_most.files import read_json, replacing
from megatron_most.report.run_files import RunFiles, number, read_run
from megatron_most.sweep.execution import state
from megatron_most.sweep.job import FAILURE, RESULT
from megatron_most.sweep.plan import PlannedRun
from megatron_most.sweep.spec import Sweep

_TAIL_SHARE = 0.1
"""The training loss is the mean over this last share of the logged lines."""


@dataclass(frozen=True)
class RunResult:
    """A planned run and what is on disk. ``metrics`` are empty unless it is finished."""

    run: PlannedRun
    state: str
    files: RunFiles | None
    metrics: dict[str, float]
    tokens: int | None
    seconds: float | None
    error: str


def collect(sweep: Sweep, runs: list[PlannedRun]) -> list[RunResult]:
    """Read the run directories."""
    return [_result(run, sweep.spec.metrics) for run in runs]


def _result(run: PlannedRun, wanted: list[str]) -> RunResult:
    now = state(run)
    files = None
    if now != "to do":
        try:
            files = read_run(run.directory)
        except DataError:
            files = None
    metrics = metrics_of(files, wanted) if files is not None and now == "finished" else {}
    tokens = [value for line in files.metrics if (value := number(line.get("consumed_tokens")))] if files else []
    error = str(_json(run.directory / FAILURE).get("error", "")) if now == "failed" else ""
    seconds = number(_json(run.directory / RESULT).get("seconds"))
    return RunResult(run, now, files, metrics, int(tokens[-1]) if tokens else None, seconds, error)


def metrics_of(files: RunFiles, wanted: list[str]) -> dict[str, float]:
    """Training loss (mean over the last tenth of its lines), last validation losses and word error rates.

    Args:
        wanted: further keys of ``metrics.jsonl``, of which the last value is taken.
    """
    found: dict[str, float] = {}
    training = [value for line in files.metrics if (value := number(line.get("loss"))) is not None]
    if training:
        tail = training[-max(1, math.ceil(len(training) * _TAIL_SHARE)) :]
        found["loss"] = sum(tail) / len(tail)
    for line in files.metrics:
        for key, value in line.items():
            parts = key.split("/")
            is_wanted = (parts[0] == "validation" and parts[-1] == "loss") or (key in wanted and key != "loss")
            if is_wanted and number(value) is not None:
                found[key] = float(value)
    for name, result in files.evaluation.items():
        if (rate := number(result.get("wer"))) is not None:
            found[f"{name}/wer"] = rate
    return found


def metric_names(sweep: Sweep, results: list[RunResult]) -> list[str]:
    """The metrics to show: those that the sweep names, else all.

    Raises:
        DataError: the sweep names a metric that no finished run has.
    """
    found = list(dict.fromkeys(name for result in results for name in result.metrics))
    wanted = sweep.spec.metrics
    absent = [name for name in wanted if name not in found]
    if absent and found:
        raise DataError(f"{sweep.path}: metrics: no run has {absent[0]!r}; there are {', '.join(found)}")
    return wanted or found


def write_tables(sweep: Sweep, results: list[RunResult], directory: Path) -> list[Path]:
    """``results.parquet`` and ``results.csv``: every run, every metric that any run has."""
    names = list(dict.fromkeys(name for result in results for name in result.metrics))
    rows: list[dict[str, Any]] = []
    for result in results:
        run = result.run
        rows.append(
            {
                "identity": run.identity,
                "run_dir": str(run.directory),
                **dict(run.variant.choices),
                "seed": run.seed,
                "state": result.state,
                "parameters": run.parameters,
                "active_parameters": run.active_parameters,
                "flops_per_token": run.flops,
                "tokens": result.tokens,
                "seconds": result.seconds,
                **{name: result.metrics.get(name) for name in names},
                "error": result.error,
            }
        )
    table = pyarrow.Table.from_pylist(rows)
    paths = [directory / "results.parquet", directory / "results.csv"]
    for path, write in zip(paths, (pyarrow.parquet.write_table, pyarrow.csv.write_csv), strict=True):
        with replacing(path) as temporary:
            write(table, temporary)
    return paths


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, DataError)
    except DataError:
        return {}
