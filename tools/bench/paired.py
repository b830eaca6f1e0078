"""Compare the speed of several implementations (arms) on a machine that may be busy with other work.

All arms run in one process. Each block runs the baseline, every other arm and the baseline once more (the control);
every second block runs in reverse order, so drift affects all arms alike. Ratios are taken within a block, medians and
quartiles over blocks. The control's ratio shows the noise: if its median is outside of 0.95 to 1.05, the comparison is
inconclusive.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

MINIMUM_BLOCKS = 15
_CONTROL = "control"
_CONTROL_RANGE = (0.95, 1.05)


@dataclass(frozen=True)
class Ratio:
    """Time of an arm divided by the baseline's: median and quartiles over blocks."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, ratios: list[float]) -> Ratio:
        lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
        return cls(median, lower, upper)

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.lower:.3f} to {self.upper:.3f})"


@dataclass(frozen=True)
class Comparison:
    """Result of :func:`compare`.

    Args:
        seconds: arm -> median wall seconds of one call.
        wall, cpu: arm -> ratio to the baseline. CPU time covers all threads of this process.
        control_wall, control_cpu: the baseline against itself.
    """

    baseline: str
    blocks: int
    seconds: dict[str, float]
    wall: dict[str, Ratio]
    cpu: dict[str, Ratio]
    control_wall: Ratio
    control_cpu: Ratio

    @property
    def conclusive(self) -> bool:
        low, high = _CONTROL_RANGE
        return low <= self.control_wall.median <= high

    def __str__(self) -> str:
        lines = [f"{self.blocks} blocks; time / time of {self.baseline}: median (quartiles)"]
        lines.append(f"  {self.baseline}: {self.seconds[self.baseline] * 1e3:.2f} ms")
        lines.append(f"    itself: wall {self.control_wall}, CPU {self.control_cpu}")
        for arm, ratio in self.wall.items():
            lines.append(f"  {arm}: {self.seconds[arm] * 1e3:.2f} ms")
            lines.append(f"    wall {ratio}, CPU {self.cpu[arm]}")
        if not self.conclusive:
            lines.append("inconclusive: the baseline against itself is not within 0.95 to 1.05; use a quieter machine")
        return "\n".join(lines)


def compare(
    arms: Mapping[str, Callable[[], object]],
    baseline: str,
    blocks: int = MINIMUM_BLOCKS,
    seconds_per_sample: float = 0.2,
    warm_up: int = 3,
) -> Comparison:
    """Time every arm against ``baseline``.

    Args:
        arms: name -> the call that is timed.
        blocks: number of ratios per arm.
        seconds_per_sample: calls per sample are chosen so that the baseline takes about this long.
        warm_up: untimed calls of each arm before the first block.
    """
    for call in arms.values():
        for _ in range(warm_up):
            call()
    once, _ = _sample(arms[baseline], 1)
    repeats = max(1, round(seconds_per_sample / once))
    order = [baseline, *(arm for arm in arms if arm != baseline), _CONTROL]
    wall: dict[str, list[float]] = {arm: [] for arm in order}
    cpu: dict[str, list[float]] = {arm: [] for arm in order}
    for block in range(blocks):
        for arm in order if block % 2 == 0 else reversed(order):
            elapsed, used = _sample(arms[baseline if arm == _CONTROL else arm], repeats)
            wall[arm].append(elapsed)
            cpu[arm].append(used)

    def ratio(times: dict[str, list[float]], arm: str) -> Ratio:
        return Ratio.of([mine / base for mine, base in zip(times[arm], times[baseline], strict=True)])

    others = order[1:-1]
    return Comparison(
        baseline=baseline,
        blocks=blocks,
        seconds={arm: statistics.median(wall[arm]) for arm in (baseline, *others)},
        wall={arm: ratio(wall, arm) for arm in others},
        cpu={arm: ratio(cpu, arm) for arm in others},
        control_wall=ratio(wall, _CONTROL),
        control_cpu=ratio(cpu, _CONTROL),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of every comparison, ``--blocks`` and ``--threads``."""
    parser.add_argument("--blocks", type=int, default=MINIMUM_BLOCKS, help="ratios per arm, at least 15 (default: 15)")
    parser.add_argument("--threads", type=int, default=1, help="threads of this process (default: 1)")


def _sample(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Wall and CPU seconds of one call, the mean over ``repeats``."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        call()
    synchronize()
    return (time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats
