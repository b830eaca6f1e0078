"""What each stage does, from results; and whether two models answer the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from examples.two_stages import evaluate, table
from megatron_most.errors import DataError, MostError
from megatron_most.evaluation.running import run_suite
from tests.unit.evaluation.test_running import Coin, Coins


def judge(run_dir: Path, model: str, values: list[float], bad: set[str] = frozenset()) -> None:
    coins = [Coin(str(place), value) for place, value in enumerate(values)]
    run_suite(Coins(coins, bad), None, run_dir / model / "evaluation" / "coins.json")


def test_a_line_has_scores_counts_and_what_stage_2_changes(tmp_path):
    judge(tmp_path, "untrained", [0.0] * 8, bad={"3"})
    judge(tmp_path, "stage1", [1.0, 0.0] * 4)
    judge(tmp_path, "stage2", [1.0] * 8)
    lines, summary = table.rows(tmp_path)
    assert [line[:9] for line in lines] == [
        ["coins", "purse", "8", "1", "accuracy (%)", "50.0", "0.0", "50.0", "100.0"]
    ]
    assert lines[0][9].startswith("+50.0 [") and lines[0][9].endswith(" better")
    assert summary == {
        "coins purse": {
            "metric": "accuracy",
            "samples": 8,
            "failed": 1,
            "untrained": 0.0,
            "stage1": 0.5,
            "stage2": 1.0,
        }  # fmt: skip
    }
    text = table.markdown(lines).splitlines()
    assert len({len(line) for line in text}) == 1 and text[1].startswith("| -----")


def test_a_result_that_a_model_lacks_is_named(tmp_path):
    judge(tmp_path, "untrained", [0.0] * 2)
    judge(tmp_path, "stage1", [0.0] * 2)
    (tmp_path / "stage2/evaluation").mkdir(parents=True)
    with pytest.raises(DataError, match="stage2/evaluation: holds no results"):
        table.rows(tmp_path)


def write_outcomes(folder: Path, *outcomes: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "suite.json").write_text("{}")
    (folder / "suite.results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ({}, *outcomes)))
    return folder


SIDES = {"positive": {"own_mean": -2.0, "whole_sum": -200.0}, "negative": {"own_mean": -3.0, "whole_sum": -300.0}}


@pytest.mark.parametrize(
    ("known", "found"),
    [
        ({"hypothesis": "the fox"}, {"hypothesis": "the dog"}),
        ({"answer": "two"}, {"answer": "two", "failed": "no sound"}),
        ({"nats": 30.0}, {"nats": 30.1}),
        (SIDES, {**SIDES, "negative": {"own_mean": -3.0, "whole_sum": -300.1}}),
    ],
)
def test_an_export_that_answers_otherwise_is_named(known, found, tmp_path):
    reference = write_outcomes(tmp_path / "native", {"id": "a", **known}, {"id": "b", **known})
    assert evaluate.require_same(write_outcomes(tmp_path / "same", {"id": "b", **known}), reference) == 1
    other = write_outcomes(tmp_path / "other", {"id": "b", **found})
    with pytest.raises(MostError, match="other/suite.json: b: is not answered as in .*native/suite.json"):
        evaluate.require_same(other, reference)


def test_rounding_is_no_difference(tmp_path):
    reference = write_outcomes(tmp_path / "native", {"id": "a", "nats": 30.0, **SIDES})
    near = {**SIDES, "negative": {"own_mean": -3.00001, "whole_sum": -300.001}}
    assert evaluate.require_same(write_outcomes(tmp_path / "near", {"id": "a", "nats": 30.0001, **near}), reference)
