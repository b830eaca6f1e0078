"""What each stage does to each suite: a table from the results of three models.

    python examples/two_stages/table.py --run-dir runs/two_stages

Writes ``table.md``, prints the same, and writes ``summary.json``: the scores by suite and model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.two_stages.world import CHANCE  # noqa: E402
from megatron_most import cli  # noqa: E402
from megatron_most.errors import DataError  # noqa: E402
from megatron_most.evaluation.comparison import Cell, compare  # noqa: E402
from megatron_most.evaluation.suites import SUITES  # noqa: E402
from megatron_most.files import read_json, write_json, write_text  # noqa: E402

MODELS = ("untrained", "stage1", "stage2")
HEAD = (
    "suite",
    "set",
    "samples",
    "failed",
    "score",
    "chance",
    "untrained",
    "stage 1",
    "stage 2",
    "what stage 2 changes",
)
NOTE = (
    "WER and bits per byte: lower is better. A change is from stage 1 to stage 2, positive where stage 2 is better."
    " Brackets hold its 95% interval, from the same samples drawn for both; 'better' and 'worse' mark one without zero."
)


def rows(run_dir: Path) -> tuple[list[list[str]], dict[str, Any]]:
    """The lines of the table, and the summary."""
    folders = [run_dir / model / "evaluation" for model in MODELS]
    _, scores = compare(folders)
    _, changes = compare(folders[1:])
    counts = _counts(folders)
    lines, summary = [], {}
    for row, change in zip(scores, changes, strict=True):
        cells = [cell for cell in row.cells if cell is not None]
        samples, failed = counts[row.suite, row.set_name]
        gain = change.cells[1]
        if len(cells) < len(MODELS) or gain is None:
            raise DataError(f"{run_dir}: {row.suite} {row.set_name} has no result of every model")
        texts = [_text(row.metric, cell.score) for cell in cells]
        chance = "50.0" if row.metric == "accuracy" else f"{100 * CHANCE:.1f}" if row.suite == "sqa" else ""
        unit = "bits per byte" if row.metric == "bits_per_byte" else f"{row.metric.replace('_', ' ')} (%)"
        lines.append(
            [row.suite, row.set_name, str(samples), str(failed), unit, chance, *texts, _change(row.metric, gain)]
        )
        summary[f"{row.suite} {row.set_name}"] = {
            "metric": row.metric,
            "samples": samples,
            "failed": failed,
            **{model: cell.score for model, cell in zip(MODELS, cells, strict=True)},
        }
    order = list(SUITES)
    return sorted(lines, key=lambda line: order.index(line[0]) if line[0] in order else len(order)), summary


def _counts(folders: list[Path]) -> dict[tuple[str, str], tuple[int, int]]:
    """Suite and set -> samples, and failed ones of all models together."""
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.json")):
            result = read_json(path, DataError)
            key = result["suite"], result["set"]
            counts[key] = result["num_samples"], counts.get(key, (0, 0))[1] + result["num_failed"]
    return counts


def _text(metric: str, value: float) -> str:
    return f"{value:.3f}" if metric == "bits_per_byte" else f"{100 * value:.1f}"


def _change(metric: str, gain: Cell) -> str:
    assert gain.gap is not None
    text = f"{'+' if gain.gap >= 0 else ''}{_text(metric, gain.gap)}"
    if gain.gap_interval is not None:
        text += " [{}, {}]".format(*(_text(metric, end) for end in gain.gap_interval))
    return f"{text} {gain.verdict}".strip()


def markdown(lines: list[list[str]]) -> str:
    """A table whose columns are aligned, so that a terminal shows it as well."""
    widths = [max(map(len, column)) for column in zip(HEAD, *lines, strict=True)]
    ruled = [list(HEAD), ["-" * width for width in widths], *lines]
    return "".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |\n"
        for line in ruled
    )


def write_table(arguments: argparse.Namespace) -> None:
    lines, summary = rows(arguments.run_dir)
    text = f"{markdown(lines)}\n{NOTE}\n"
    write_text(arguments.run_dir / "table.md", text)
    write_json(arguments.run_dir / "summary.json", summary)
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="what each stage does to each suite")
    parser.add_argument("--run-dir", type=Path, required=True)
    cli.run(parser, write_table)
