"""Several models on the same suites: one table, each model against the first, with paired bootstrap intervals."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_most.errors import DataError
from megatron_most.evaluation.running import read_outcomes
from megatron_most.evaluation.scores import difference, units_of
from megatron_most.files import read_json

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Comparison of models</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ padding: .4rem .7rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }}
td.number {{ font-variant-numeric: tabular-nums; white-space: nowrap; }}
.better {{ color: #0a6b2d; }} .worse {{ color: #a3221b; }}
</style>
</head>
<body>
<h1>Comparison of models</h1>
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
<p>{note}</p>
</body>
</html>
"""
NOTE = (
    "Brackets hold 95% bootstrap intervals. A difference is to the first model, from the same samples drawn for both"
    " (paired bootstrap); it is marked where its interval leaves out zero."
)


@dataclass(frozen=True)
class Cell:
    """One model on one suite.

    gap: to the first model, in the direction of better; None for the first model itself.
    """

    score: float
    interval: tuple[float, float] | None
    num_failed: int
    gap: float | None = None
    gap_interval: tuple[float, float] | None = None
    p: float | None = None

    @property
    def verdict(self) -> str:
        """``better``, ``worse`` or neither, by the interval of the difference."""
        if self.gap_interval is None or self.gap_interval[0] <= 0 <= self.gap_interval[1]:
            return ""
        return "better" if self.gap_interval[0] > 0 else "worse"


@dataclass(frozen=True)
class Row:
    """One suite on one set; a cell for each model, None where it has no result."""

    suite: str
    set_name: str
    metric: str
    cells: tuple[Cell | None, ...]


def compare(paths: Sequence[str | Path]) -> tuple[list[str], list[Row]]:
    """Names of the models and rows of the table.

    Args:
        paths: for each model a result (``.json``), or a folder of results such as ``evaluation`` of a run.

    Raises:
        DataError: a result is missing, damaged, without its outcomes, or was made with other settings than the first.
    """
    models = [_results(Path(path)) for path in paths]
    names = [_name(Path(path)) for path in paths]
    keys = list(dict.fromkeys(key for results in models for key in results))
    rows = []
    for key in keys:
        entries = [results.get(key) for results in models]
        first = next(entry for entry in entries if entry is not None)
        cells = tuple(None if entry is None else _cell(first, entry) for entry in entries)
        rows.append(Row(*key, first[1]["metric"], cells))
    return names, rows


Entry = tuple[Path, dict[str, Any]]


def _results(path: Path) -> dict[tuple[str, str], Entry]:
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    found: dict[tuple[str, str], Entry] = {}
    for file in files:
        result = read_json(file, DataError)
        if {"suite", "set", "metric", "score", "files"} <= result.keys():
            found[result["suite"], result["set"]] = (file, result)
        elif not path.is_dir():
            raise DataError(f"{file}: is no result of most evaluate with outcomes of its samples")
    if not found:
        raise DataError(f"{path}: holds no results of most evaluate with outcomes of their samples")
    return found


def _name(path: Path) -> str:
    """What tells a model's results from others': the file, or the run whose ``evaluation`` folder it is."""
    return str(path.parent if path.name == "evaluation" else path.with_suffix("") if path.suffix == ".json" else path)


def _cell(first: Entry, entry: Entry) -> Cell:
    result = entry[1]
    interval = None if result["interval"] is None else (result["interval"][0], result["interval"][1])
    known = (result["score"], interval, result["num_failed"])
    if entry is first:
        return Cell(*known)
    for name in ("settings", "metric"):
        if result[name] != first[1][name]:
            raise DataError(f"{entry[0]}: {name} {result[name]!r} differ from {first[1][name]!r} in {first[0]}")
    units = [units_of(read_outcomes(file)) for file, _ in (first, entry)]
    if units[0].keys() != units[1].keys():
        odd = sorted(units[0].keys() ^ units[1].keys())[0]
        raise DataError(f"{entry[0]} and {first[0]}: were not judged on the same samples: only one has {odd!r}")
    gap, limits, p = difference(*units)
    if result["lower_is_better"]:
        gap, limits = -gap, None if limits is None else (-limits[1], -limits[0])
    return Cell(*known, gap, limits, p)


def _score_text(metric: str, value: float) -> str:
    return f"{value:.4f}" if metric == "bits_per_byte" else f"{100 * value:.2f}"


def _texts(metric: str, cell: Cell | None) -> list[str]:
    """Score and, but for the first model, difference."""
    if cell is None:
        return ["", ""]
    score = _score_text(metric, cell.score)
    if cell.interval is not None:
        score += " [{}, {}]".format(*(_score_text(metric, end) for end in cell.interval))
    if cell.num_failed:
        score += f", {cell.num_failed} failed"
    if cell.gap is None:
        return [score, ""]
    sign = "+" if cell.gap >= 0 else ""
    gap = f"{sign}{_score_text(metric, cell.gap)}"
    if cell.gap_interval is not None:
        gap += " [{}, {}]".format(*(_score_text(metric, end) for end in cell.gap_interval))
        gap += f", p = {cell.p:.3f}"
    return [score, f"{gap} {cell.verdict}".strip()]


def _head(names: Sequence[str]) -> list[str]:
    head = ["suite", "set", "metric", names[0]]
    for name in names[1:]:
        head += [name, f"gain of {name}"]
    return head


def _line(row: Row) -> list[str]:
    line = [row.suite, row.set_name, row.metric if row.metric == "bits_per_byte" else f"{row.metric} (%)"]
    for place, cell in enumerate(row.cells):
        texts = _texts(row.metric, cell)
        line += texts[:1] if place == 0 else texts
    return line


def markdown(names: Sequence[str], rows: Sequence[Row]) -> str:
    """The table in Markdown. A gain is positive where the model is better, also where lower scores are."""
    head = _head(names)
    lines = [head, ["---"] * len(head), *map(_line, rows)]
    table = [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]
    return "\n".join([*table, "", NOTE, ""])


def page(names: Sequence[str], rows: Sequence[Row]) -> str:
    """The table as an HTML page that loads nothing."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in _head(names))
    lines = []
    for row in rows:
        cells = []
        for place, text in enumerate(_line(row)):
            verdict = next((word for word in ("better", "worse") if text.endswith(f" {word}")), "")
            kind = "number" if place > 2 else ""
            cells.append(f'<td class="{f"{kind} {verdict}".strip()}">{html.escape(text)}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return _PAGE.format(head=head, rows="\n".join(lines), note=html.escape(NOTE))
