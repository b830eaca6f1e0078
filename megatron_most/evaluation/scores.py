"""The score of a suite from the outcomes of its samples, with a bootstrap interval.

Every outcome has a ``value`` and a ``weight`` (1 if it names none), and belongs to a ``unit`` (its own id if it names
none). A unit is what is drawn with replacement: one pair of sentences, however many voices read it. Its value and
weight are means over its samples.

    score = sum of the units' values / sum of their weights

Shape letters: n units, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

CONFIDENCE = 0.95
_RESAMPLES = 10_000
_SEED = 0


def units_of(outcomes: Sequence[Mapping[str, Any]], key: str = "value") -> dict[str, tuple[float, float]]:
    """Value and weight of each unit, in the order in which they first occur; ``key`` names the value to take."""
    members: dict[str, list[tuple[float, float]]] = {}
    for outcome in outcomes:
        unit = str(outcome.get("unit", outcome["id"]))
        members.setdefault(unit, []).append((float(outcome[key]), float(outcome.get("weight", 1))))
    return {unit: (_mean(of[0] for of in rows), _mean(of[1] for of in rows)) for unit, rows in members.items()}


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found)


def score(units: Mapping[str, tuple[float, float]]) -> float:
    """The score; 0 if no unit has any weight."""
    weight = sum(pair[1] for pair in units.values())
    return sum(pair[0] for pair in units.values()) / weight if weight else 0.0


def interval(units: Mapping[str, tuple[float, float]]) -> tuple[float, float] | None:
    """The percentile bootstrap interval of :func:`score` at :data:`CONFIDENCE`; see :func:`bootstrap_interval`."""
    values, weights = np.array(list(units.values())).T if units else np.zeros((2, 0))
    return bootstrap_interval(values, weights)


def bootstrap_interval(values: np.ndarray, weights: np.ndarray) -> tuple[float, float] | None:
    """Percentile interval of sum(values) / sum(weights), both ``[n]``; None for fewer than two units.

    Units are drawn with replacement (Bisani and Ney 2004, https://doi.org/10.1109/ICASSP.2004.1326009) from a fixed
    seed: the same outcomes give the same interval. It says how much the score depends on the choice of samples, and
    nothing about other training runs.
    """
    if len(values) < 2:
        return None
    value, weight = _resampled(np.stack([values, weights], axis=1)).T
    has_weight = weight != 0  # only units without any may have been drawn
    return _percentiles(value[has_weight] / weight[has_weight])


def difference(
    first: Mapping[str, tuple[float, float]], second: Mapping[str, tuple[float, float]]
) -> tuple[float, tuple[float, float] | None, float]:
    """Of two models on the same units: second minus first, its interval, and the share of resamples without a gain.

    The same units are drawn for both (paired bootstrap), so what is hard for both does not widen the interval. The last
    number is twice the smaller share of resamples on either side of zero: a two-sided p-value.
    """
    assert first.keys() == second.keys(), "a paired bootstrap compares the same units"
    gap = score(second) - score(first)
    if len(first) < 2:
        return gap, None, 1.0
    rows = np.array([(*first[unit], *second[unit]) for unit in first])
    value_1, weight_1, value_2, weight_2 = _resampled(rows).T
    has_weight = (weight_1 != 0) & (weight_2 != 0)
    gaps = (value_2[has_weight] / weight_2[has_weight]) - (value_1[has_weight] / weight_1[has_weight])
    side = min((gaps <= 0).mean(), (gaps >= 0).mean())
    return gap, _percentiles(gaps), float(min(1.0, 2 * side))


def _resampled(rows: np.ndarray) -> np.ndarray:
    """``rows [n, k]`` -> sums ``[R, k]`` of n rows drawn with replacement."""
    random, count = np.random.default_rng(_SEED), len(rows)
    sums = np.empty((_RESAMPLES, rows.shape[1]))
    for place in range(_RESAMPLES):
        sums[place] = np.bincount(random.integers(0, count, count), minlength=count) @ rows
    return sums


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
