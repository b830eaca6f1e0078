"""The table of several models, from the files that evaluation leaves."""

from __future__ import annotations

import json

import pytest

from megatron_most.commands import compare as command
from megatron_most.errors import DataError
from megatron_most.evaluation import comparison
from megatron_most.evaluation.running import run_suite
from tests.unit.evaluation.test_running import Coin, Coins


class Rates(Coins):
    name, metric, lower_is_better = "asr", "wer", True


def write(folder, values: list[float], suite=Coins, **options):
    """Results of one model in ``folder``; every sample has its value."""
    coins = [Coin(str(place), value) for place, value in enumerate(values)]
    run_suite(suite(coins, **options), None, folder / f"{suite.name}.json")
    return folder


HARD = [float(place % 3 == 0) for place in range(90)]
EASY = [float(place % 3 == 0 or place % 5 == 0) for place in range(90)]


def test_a_gain_is_paired_and_marked_where_zero_is_outside(tmp_path):
    first, second = write(tmp_path / "a", HARD), write(tmp_path / "b", EASY)
    names, [row] = comparison.compare([first, second])
    assert names == [str(first), str(second)]
    before, after = row.cells
    assert (row.suite, row.set_name, row.metric) == ("coins", "purse", "accuracy")
    assert before.score == sum(HARD) / 90 and before.gap is None
    assert after.gap == pytest.approx(sum(EASY) / 90 - sum(HARD) / 90) and after.verdict == "better"
    [_, [back]] = comparison.compare([second, first])
    assert back.cells[1].gap == -after.gap and back.cells[1].verdict == "worse"
    [_, [same]] = comparison.compare([first, first])
    assert same.cells[1].gap == 0 and same.cells[1].verdict == ""


def test_a_lower_error_rate_is_a_gain(tmp_path):
    [_, [row]] = comparison.compare([write(tmp_path / "a", EASY, Rates), write(tmp_path / "b", HARD, Rates)])
    assert row.cells[1].gap > 0 and row.cells[1].verdict == "better"


def test_suites_that_one_model_lacks_are_empty_cells(tmp_path):
    first = write(write(tmp_path / "run" / "evaluation", HARD), HARD, Rates)
    table = comparison.compare([first, write(tmp_path / "b", EASY)])
    assert [(row.suite, [cell is not None for cell in row.cells]) for row in table[1]] == [
        ("asr", [True, False]),
        ("coins", [True, True]),
    ]
    assert table[0][0] == str(tmp_path / "run")
    lines = comparison.markdown(*table).splitlines()
    assert lines[0].startswith(f"| suite | set | metric | {tmp_path / 'run'} | {tmp_path / 'b'} | gain of ")
    assert lines[2] == "| asr | purse | wer (%) | 33.33 [23.33, 43.33] |  |  |"
    assert " better |" in lines[3] and ", p = " in lines[3]


def test_pages_escape_names_and_color_gains(tmp_path):
    table = comparison.compare([write(tmp_path / "<a&b>", HARD), write(tmp_path / "b", EASY)])
    page = comparison.page(*table)
    assert "&lt;a&amp;b&gt;" in page and "<a&b>" not in page
    assert 'class="number better"' in page


def test_the_command_prints_or_writes(tmp_path, capsys):
    results = [str(write(tmp_path / "a", HARD) / "coins.json"), str(write(tmp_path / "b", EASY) / "coins.json")]
    command.main(results)
    printed = capsys.readouterr().out
    assert printed.startswith("| suite | set |")
    outputs = [tmp_path / "new" / "table.md", tmp_path / "table.html"]
    command.main([*results, "--output", *map(str, outputs)])
    assert outputs[0].read_text() == printed and outputs[1].read_text().startswith("<!DOCTYPE html>")
    for wrong, message in (
        ([results[0]], "at least two"),
        ([*results, "--output", "x.txt"], "must end in .md or .html"),
    ):
        with pytest.raises(SystemExit):
            command.main(wrong)
        assert message in capsys.readouterr().err


def test_results_that_do_not_compare_are_refused(tmp_path):
    first = write(tmp_path / "a", HARD)
    with pytest.raises(DataError, match="not judged on the same samples: only one has '89'"):
        comparison.compare([first, write(tmp_path / "b", HARD[:-1])])
    with pytest.raises(DataError, match="settings {'currency': 'euro'} differ from {}"):
        comparison.compare([first, write(tmp_path / "c", HARD, settings={"currency": "euro"})])
    (tmp_path / "old.json").write_text(json.dumps({"suite": "asr", "set": "s", "wer": 0.1}))
    with pytest.raises(DataError, match="old.json: is no result of most evaluate with outcomes"):
        comparison.compare([first, tmp_path / "old.json"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: holds no results"):
        comparison.compare([first, tmp_path / "empty"])
    (tmp_path / "a" / "coins.results.jsonl").unlink()
    with pytest.raises(DataError, match="coins.results.jsonl: not readable as outcomes"):
        comparison.compare([tmp_path / "a" / "coins.json", write(tmp_path / "d", HARD)])
