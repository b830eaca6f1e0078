"""Means and differences over seeds, with 95 % intervals from Student's t distribution."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """Mean of ``count`` values; the interval is ``mean`` plus or minus ``half_width``, infinite for a single value."""

    mean: float
    half_width: float
    count: int

    @property
    def is_beyond_noise(self) -> bool:
        """Whether the interval excludes 0."""
        return abs(self.mean) > self.half_width


def estimate(values: Sequence[float], confidence: float = 0.95) -> Estimate | None:
    """Mean of independent, roughly normal values, with ``t(n - 1) s / sqrt(n)`` to either side; None without values."""
    count = len(values)
    if not count:
        return None
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, math.inf, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    quantile = float(stats.t.ppf((1 + confidence) / 2, count - 1))
    return Estimate(mean, quantile * deviation / math.sqrt(count), count)


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """Estimate of ``values - baseline``, seed by seed, over the seeds that both have."""
    return estimate([values[seed] - baseline[seed] for seed in values if seed in baseline])
