"""Which device and communication backend this process uses, and how many threads."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess

import torch


def device() -> torch.device:
    """The accelerator of this local rank, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def backend() -> str:
    """The ``torch.distributed`` backend that serves :func:`device`."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def has_fp8() -> bool:
    """Whether the accelerator multiplies FP8 numbers: Ada, Hopper and later."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device()) >= (8, 9)


def has_grouped_fp8() -> bool:
    """Whether torch's grouped FP8 product has a kernel for the accelerator: compute capability 9.x and 10.x alone."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device())[0] in (9, 10)


def driver_version() -> str:
    """Of NVIDIA's driver, as ``nvidia-smi`` tells it; ``unknown`` where that is not to be had."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True)
    return "unknown" if result.returncode else result.stdout.split("\n")[0].strip()


def peak_memory() -> int:
    """Most bytes that this process has held so far: allocated on its GPU, or resident where it has none."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def set_threads(count: int = 0) -> int:
    """Set the intra-op threads of this process and return their number.

    ``count`` 0 shares the cores this process may run on evenly among the ranks of this machine, so that CPU ranks do
    not fight for them.
    """
    if count == 0:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(count)
    return count
