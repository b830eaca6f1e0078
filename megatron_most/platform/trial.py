"""Triton's kernels on this machine, and which of two implementations is the faster one here."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_most.platform.device import device

_CALLS = 10
_ROUNDS = 5


def can_run_triton() -> bool:
    """Whether Triton is installed and has a device: a GPU, or the CPU with Triton's interpreter, which is slow."""
    has_device = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
    return has_device and importlib.util.find_spec("triton") is not None


def compare_seconds(*calls: Callable[[], object] | None) -> list[float]:
    """Seconds that each call takes on the slowest rank; the same on every rank. Collective.

    Calls take turns, and the best of several rounds counts, so that other work on the machine weighs less. A rank
    without a call (None) takes part in the agreement alone.
    """
    seconds = [0.0 if call is None else float("inf") for call in calls]
    for _ in range(1 + _ROUNDS):  # the first compiles
        for index, call in enumerate(calls):
            if call is not None:
                seconds[index] = min(seconds[index], _seconds_of(call))
    slowest = torch.tensor(seconds, dtype=torch.float64, device=device())
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.tolist()


def _seconds_of(call: Callable[[], object]) -> float:
    """Mean of some calls that follow each other, until the device has done them."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(_CALLS):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / _CALLS
