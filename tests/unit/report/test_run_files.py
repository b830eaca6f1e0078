"""Reading a run directory that is whole, torn, broken or not there."""

import json

import pytest

from megatron_most.errors import DataError
from megatron_most.report.run_files import number, read_run
from tests.unit.report.fake_run import make_run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "whole", steps=60)


def test_a_whole_run_has_no_notes(whole):
    run = read_run(whole)
    assert run.notes == []
    assert [line["step"] for line in run.routing] == [10, 20, 30, 40, 50, 60]
    assert run.modalities == ["text", "audio"]
    assert sorted(run.evaluation)[0] == "asr_heldout_p"
    assert run.sets == ["heldout_s", "heldout_p"]
    assert run.summary["steps"] == 60


def test_metrics_alone_are_a_run_and_the_rest_is_noted(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    run = read_run(tmp_path)
    assert run.metrics == [{"step": 1, "loss": 2.5}]
    missing = {"routing.jsonl", "summary.json", "environment.json", "config.yaml", "evaluation/*.json"}
    assert {note.split(" is missing")[0] for note in run.notes} == missing
    assert run.modalities == ["text", "audio"]


def test_a_torn_last_line_is_left_out_and_noted(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    run = read_run(tmp_path)
    assert [line["step"] for line in run.metrics] == [1]
    assert any(note.startswith("The last line of metrics.jsonl is incomplete") for note in run.notes)


def test_broken_lines_are_counted(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnot json\n[1]\n{"loss": 1}\n{"step": "x"}\n{"step": 2}\n')
    run = read_run(tmp_path)
    assert [line["step"] for line in run.metrics] == [1, 2]
    assert "4 unreadable lines of metrics.jsonl are left out, the first is line 2." in run.notes


@pytest.mark.parametrize("text", ["{", "[1, 2]", "null"])
def test_a_broken_json_file_is_noted(whole, tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "summary.json").write_text(text)
    run = read_run(tmp_path)
    assert run.summary == {}
    assert any(note.startswith("summary.json is left out: ") for note in run.notes)


def test_a_broken_config_is_kept_as_text(tmp_path):
    (tmp_path / "config.yaml").write_text("model: [1\n")
    run = read_run(tmp_path)
    assert run.config_text == "model: [1\n"
    assert run.config == {}
    assert any("not valid YAML" in note for note in run.notes)


def test_an_evaluation_without_a_list_of_items_is_noted(tmp_path):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "asr.json").write_text(json.dumps({"suite": "asr", "items": "none"}))
    (tmp_path / "evaluation" / "tts.json").write_text(json.dumps({"suite": "tts", "items": []}))
    run = read_run(tmp_path)
    assert list(run.evaluation) == ["tts"]
    assert "evaluation/asr.json is left out: items must be a list." in run.notes


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="absent: no such run directory"):
        read_run(tmp_path / "absent")
    with pytest.raises(DataError, match="holds no run"):
        read_run(tmp_path)


@pytest.mark.parametrize("value", [True, "1", None, [1], float("nan"), float("inf")])
def test_what_is_no_measurement(value):
    assert number(value) is None
    assert number(3) == 3.0
