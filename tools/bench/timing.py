"""Time of a call on the device, and the device's rate of matrix products."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch._dynamo.utils import counters

from megatron_most import platform

WARM_UP = 5
"""Untimed calls, in which kernels are chosen and compiled and memory is allocated."""


@dataclass(frozen=True)
class Timing:
    """Median and quartiles of a call's seconds, and compilations of ``torch.compile`` during the timed calls."""

    median: float
    lower: float
    upper: float
    recompilations: int = 0

    @classmethod
    def of(cls, seconds: list[float], recompilations: int = 0) -> Timing:
        lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, lower, upper, recompilations)

    def __str__(self) -> str:
        recompiled = f", {self.recompilations} recompilations" if self.recompilations else ""
        return f"{self.median * 1e3:.3f} ms (IQR {self.lower * 1e3:.3f} to {self.upper * 1e3:.3f}{recompiled})"


def time_calls(call: Callable[[], object], calls: int) -> Timing:
    """Time ``calls`` calls, each alone, after :data:`WARM_UP` others: with CUDA events, on a CPU with the clock."""
    for _ in range(WARM_UP):
        call()
    compiled = _compilations()
    if platform.device().type != "cuda":
        seconds = [_on_clock(call) for _ in range(calls)]
        return Timing.of(seconds, _compilations() - compiled)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    torch.cuda.synchronize()
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return Timing.of([start.elapsed_time(end) / 1e3 for start, end in events], _compilations() - compiled)


def _compilations() -> int:
    """Frames that ``torch.compile`` has compiled in this process."""
    return counters["frames"]["total"]


def matmul_rate(size: int, dtype: torch.dtype, calls: int) -> float:
    """FLOP/s of a product of two square matrices, the ceiling for other rates."""
    a, b = (torch.randn(size, size, dtype=dtype, device=platform.device()) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / time_calls(lambda: torch.mm(a, b, out=out), calls).median


def _on_clock(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
