"""How a suite is run: resumed, failed samples, scores and intervals."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest

from megatron_most.errors import ConfigError, DataError
from megatron_most.evaluation import running, scores
from megatron_most.evaluation.running import read_outcomes, run_suite
from megatron_most.evaluation.suites.base import Suite


@dataclass(frozen=True)
class Coin:
    id: str
    value: float = 1.0


class Coins(Suite[Coin]):
    """Sums up what coins are worth; those of ``bad`` fail."""

    name, set_name = "coins", "purse"

    def __init__(self, coins: list[Coin], bad: set[str] = frozenset(), settings: dict | None = None) -> None:
        self.coins, self.bad, self._settings = coins, bad, settings or {}
        self.judged: list[str] = []

    @property
    def samples(self):
        return self.coins

    @property
    def settings(self):
        return self._settings

    def outcomes(self, model, samples):
        self.judged += [coin.id for coin in samples]
        return [
            self.failure(coin, "lost") if coin.id in self.bad else {"id": coin.id, "value": coin.value}
            for coin in samples
        ]

    def failure(self, sample, reason):
        return {"id": sample.id, "value": 0.0, "failed": reason}


def coins(count: int) -> list[Coin]:
    return [Coin(str(index), float(index % 2)) for index in range(count)]


def test_a_failed_sample_counts_as_wrong_and_is_listed(tmp_path):
    output = tmp_path / "coins.json"
    result = run_suite(Coins([Coin(str(i)) for i in range(10)], bad={"3"}), None, output)
    assert result["score"] == 0.9
    assert result["failed"] == [{"id": "3", "failed": "lost"}] and result["num_failed"] == 1
    written = json.loads(output.read_text())
    assert written["score"] == 0.9 and written["num_samples"] == 10 and written["files"] == ["coins.results.jsonl"]
    assert [entry["id"] for entry in read_outcomes(output)] == [str(i) for i in range(10)]


def test_a_run_that_was_cut_off_goes_on_and_tries_failures_again(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "CHUNK", 4)
    output, everything = tmp_path / "coins.json", coins(10)

    class Killed(Coins):
        def outcomes(self, model, samples):
            if "8" in [coin.id for coin in samples]:
                raise KeyboardInterrupt
            return super().outcomes(model, samples)

    with pytest.raises(KeyboardInterrupt):
        run_suite(Killed(everything, bad={"2"}), None, output)
    journal = tmp_path / "coins.results.jsonl"
    assert len(journal.read_text().splitlines()) == 9 and not output.exists()
    journal.write_text(journal.read_text() + '{"id": "8", "va')  # cut in the middle of a line
    mended = Coins(everything)
    assert run_suite(mended, None, output)["score"] == 0.5
    assert mended.judged == ["2", "8", "9"]
    assert [entry["id"] for entry in read_outcomes(output)] == [coin.id for coin in everything]
    again = Coins(everything)
    run_suite(again, None, output)
    assert again.judged == []
    run_suite(again, None, output, fresh=True)
    assert len(again.judged) == 10


def test_another_question_starts_anew(tmp_path, capsys):
    output = tmp_path / "coins.json"
    run_suite(Coins(coins(4)), None, output)
    changed = Coins(coins(4), settings={"currency": "euro"})
    run_suite(changed, None, output)
    assert len(changed.judged) == 4
    assert "coins.results.jsonl: holds outcomes of another question; starting anew" in capsys.readouterr().err


def test_what_cannot_be_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="purse: no samples"):
        run_suite(Coins([]), None)
    with pytest.raises(DataError, match="purse: two samples have the id 'a'"):
        run_suite(Coins([Coin("a"), Coin("b"), Coin("a")]), None)
    with pytest.raises(DataError, match="purse: no sample could be judged: lost"):
        run_suite(Coins([Coin("a")], bad={"a"}), None)
    with pytest.raises(ConfigError, match="must be a .json file"):
        run_suite(Coins(coins(2)), None, tmp_path / "result")
    with pytest.raises(DataError, match="not readable as outcomes"):
        read_outcomes(tmp_path / "absent.json")


def test_a_score_is_the_mean_over_units_of_the_means_over_their_samples():
    rows = [("a", 1), ("a", 0), ("a", 0.5), ("b", 1), ("c", 0), ("c", 1)]
    outcomes = [{"id": str(place), "unit": unit, "value": value} for place, (unit, value) in enumerate(rows)]
    units = scores.units_of(outcomes)
    assert units == {"a": (0.5, 1), "b": (1, 1), "c": (0.5, 1)}
    assert scores.score(units) == pytest.approx(2 / 3)


def test_a_weighted_score_is_a_ratio_of_sums():
    outcomes = [{"id": "a", "value": 1, "weight": 4}, {"id": "b", "value": 2, "weight": 2}]
    assert scores.score(scores.units_of(outcomes)) == 0.5


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """60 sets of 200 throws of a fair coin: 95 % of the intervals hold one half, up to three standard errors."""
    random = np.random.default_rng(0)
    held = 0
    for _ in range(60):
        low, high = scores.bootstrap_interval(random.integers(0, 2, 200), np.ones(200))
        held += low <= 0.5 <= high
    assert held >= 60 * 0.95 - 3 * (60 * 0.95 * 0.05) ** 0.5


def test_a_paired_difference_has_a_narrower_interval_than_two_scores():
    random = np.random.default_rng(1)
    hard = random.random(200) < 0.5  # for both
    first = {str(place): (float(not one), 1.0) for place, one in enumerate(hard)}
    better = {key: (1.0 if int(key) % 8 == 0 else value, weight) for key, (value, weight) in first.items()}
    gap, (low, high), p = scores.difference(first, better)
    assert gap == pytest.approx(scores.score(better) - scores.score(first)) and 0 < low < gap < high
    assert p < 0.05
    alone = scores.interval(first)
    assert high - low < (alone[1] - alone[0]) / 2
    assert scores.difference(first, first) == (0.0, (0.0, 0.0), 1.0)
