"""Several runs on one page."""

import json
import re

import pytest

from megatron_most.errors import ConfigError, DataError
from megatron_most.report import write_comparison
from megatron_most.report.comparison import _labels
from tests.unit.report.fake_run import make_run
from tests.unit.report.test_page import HOSTILE, Page


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder / "short", steps=40), make_run(folder / "long", steps=80, group=6)]


def test_curves_of_all_runs_are_in_one_chart(runs, tmp_path):
    text = write_comparison(runs, tmp_path / "c.html").read_text()
    page = Page(text)
    data = [json.loads(one) for one in re.findall(r'<script type="application/json">(.*?)</script>', text)]
    charts = {one["title"]: one["views"] for one in data}
    assert {"loss", "loss/text", "loss/tts", "lr", "tokens_per_second", "max_memory_bytes"} <= set(charts)
    by_steps, by_tokens = charts["loss"]
    assert [(one["label"], one["points"][-1][0]) for one in by_steps["series"]] == [("short", 40), ("long", 80)]
    assert [one["points"][-1][0] for one in by_tokens["series"]] == [40 * 1500, 80 * 1500]
    assert len({one["color"] for one in by_steps["series"]}) == 2
    assert "ASR: heldout_s 5.0% of 6 5.0% of 6" in page.text
    assert not page.all("link")


def test_only_settings_that_differ_are_listed(runs, tmp_path):
    page = Page(write_comparison(runs, tmp_path / "c.html").read_text())
    differences = page.text.split("Differences in configuration and environment")[1]
    assert "model.moe.groups" in differences
    assert "num_layers" not in differences
    assert "run_dir" not in differences


def test_runs_of_equal_names_are_told_apart(tmp_path):
    assert _labels([tmp_path / "a" / "run", tmp_path / "b" / "run"]) == ["a/run", "b/run"]
    assert _labels([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]


def test_what_is_missing_is_told_by_run(runs, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    page = Page(write_comparison([runs[0], tmp_path / "bare"], tmp_path / "c.html").read_text())
    assert "bare: summary.json is missing" in page.text
    assert "short: " not in page.text
    assert "5.0% of 6 not measured" in page.text


def test_hostile_text_stays_text(runs, tmp_path):
    folder = tmp_path / "<b>run"
    make_run(folder, steps=40)
    (folder / "environment.json").write_text(json.dumps({"device": HOSTILE, HOSTILE: HOSTILE}))
    page = Page(write_comparison([runs[0], folder], tmp_path / "c.html").read_text())
    assert not page.all("img")
    assert not page.all("b") or all(not attributes for attributes in page.all("b"))
    assert len([one for one in page.all("script") if "type" not in one]) == 1


def test_wrong_directories_are_refused_and_nothing_written(runs, tmp_path):
    with pytest.raises(DataError, match="absent: no such run directory"):
        write_comparison([runs[0], tmp_path / "absent"], tmp_path / "c.html")
    with pytest.raises(ConfigError, match="short: named twice"):
        write_comparison([runs[0], runs[0]], tmp_path / "c.html")
    with pytest.raises(ConfigError, match="at least 2 runs, got 1"):
        write_comparison(runs[:1], tmp_path / "c.html")
    assert list(tmp_path.iterdir()) == []
