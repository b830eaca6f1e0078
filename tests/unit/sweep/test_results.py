"""What a sweep came to: tables of every run, means over seeds, differences seed by seed, and the page."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow.parquet
import pytest

from megatron_most.config import CONFIG, dump_config
from megatron_most.errors import DataError
from megatron_most.sweep.job import FAILURE, LOG, RESULT
from megatron_most.sweep.page import write_results
from megatron_most.sweep.plan import PlannedRun, plan_runs
from megatron_most.sweep.spec import Sweep, load_sweep
from tests.distributed.tiny import tiny_config
from tests.unit.report.fake_run import make_run
from tests.unit.report.test_page import Page

HOSTILE = "<img src=x onerror=alert(1)>"
LOSSES = {"shared": (2.0, 3.0, 4.0), "none": (2.5, 3.6, 4.4)}
"""Last training loss of each seed: the second is worse by 0.5, 0.6 and 0.4."""


def plan(folder: Path, metrics: str = "[]") -> tuple[Sweep, list[PlannedRun]]:
    config = tiny_config(run_dir=folder / "run")
    (folder / "base.yaml").write_text(dump_config(config))
    (folder / "sweep.yaml").write_text(
        f"{{name: '{HOSTILE}', base: {folder}/base.yaml, output: {folder}/out, seeds: [1, 2, 3], metrics: {metrics},"
        " axes: {experts: {shared: {}, none: {model.moe.moe_shared_expert_intermediate_size: 0}}}}"
    )
    sweep = load_sweep(folder / "sweep.yaml")
    return sweep, plan_runs(sweep)


def finish(run: PlannedRun, loss: float) -> None:
    """Leave what training and evaluation leave; its last logged losses are ``loss``."""
    make_run(run.directory, steps=100)
    lines = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    changed = [{**line, "loss": loss} if line["step"] == 100 and "loss" in line else line for line in lines]
    (run.directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    (run.directory / RESULT).write_text(json.dumps({"identity": run.identity, "attempts": 1, "seconds": 90.0}))


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> tuple[Sweep, list[PlannedRun], list[Path]]:
    folder = tmp_path_factory.mktemp("sweep")
    sweep, runs = plan(folder, "[loss, validation/heldout_s_asr/loss, asr_heldout_s/wer]")
    for run in runs:
        finish(run, LOSSES[run.variant.labels[0]][run.seed - 1])
    return sweep, runs, write_results(sweep, runs)


def test_every_run_is_a_row_of_both_tables(ended):
    _, runs, (parquet, table, _, _) = ended
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["identity"] for row in rows] == [run.identity for run in runs]
    assert [float(row["loss"]) for row in rows] == [*LOSSES["shared"], *LOSSES["none"]]
    assert {row["state"] for row in rows} == {"finished"} and {row["experts"] for row in rows} == {"shared", "none"}
    assert int(rows[0]["active_parameters"]) > int(rows[3]["active_parameters"])
    assert pyarrow.parquet.read_table(parquet).column("asr_heldout_s/wer").to_pylist() == [0.05] * 6


def test_means_and_paired_differences(ended):
    """t(2) at 97.5 % is 4.3027: 3 +- 4.3027 / sqrt(3), and 0.5 +- 4.3027 * 0.1 / sqrt(3)."""
    text = ended[2][2].read_text()
    assert "| shared (baseline) | 3 of 3 |" in text and "| 3 ± 2.5 |" in text
    assert "+0.5 ± 0.25, beyond noise" in text


def test_the_page_shows_it_and_nothing_of_a_file_is_taken_for_html(ended):
    page = Page(ended[2][3].read_text(encoding="utf-8"))
    assert HOSTILE in page.text and not any(image.get("src") == "x" for image in page.all("img"))
    for shown in ("6 runs", "6 finished", "+0.5 ± 0.25, beyond noise", "shared (baseline)", "asr_heldout_s/wer"):
        assert shown in page.text
    assert all("src" not in attributes for attributes in page.all("script")) and not page.all("link")
    assert "routing" in page.text.lower() and not any("No routing" in text for text in page.texts)


def test_failures_and_runs_to_do_are_shown_and_count_in_no_mean(tmp_path):
    sweep, runs = plan(tmp_path)
    finish(runs[0], 2.0)
    failed = runs[1].directory
    make_run(failed, steps=50)
    (failed / LOG).write_text("")
    (failed / FAILURE).write_text(json.dumps({"error": "training ended with status 1: error: disk full"}))
    runs[2].directory.mkdir(parents=True)
    (runs[2].directory / CONFIG).write_text(dump_config(runs[2].config))
    paths = write_results(sweep, runs)
    rows = list(csv.DictReader(paths[1].read_text().splitlines()))
    assert [row["state"] for row in rows] == ["finished", "failed", *["to do"] * 4]
    assert [row["loss"] for row in rows[1:]] == [""] * 5
    page = Page(paths[3].read_text(encoding="utf-8"))
    assert "error: disk full" in page.text and "1 of 3" in page.text and "0 of 3" in page.text


def test_a_metric_that_no_run_has_is_named(tmp_path):
    sweep, runs = plan(tmp_path, "[loss/smell]")
    finish(runs[0], 2.0)
    with pytest.raises(DataError, match=r"sweep.yaml: metrics: no run has 'loss/smell'; there are loss, "):
        write_results(sweep, runs)
