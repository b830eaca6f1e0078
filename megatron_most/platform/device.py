"""The device, communication backend and threads of this process."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess

import torch

from megatron_most.cli import launcher_integer


def device() -> torch.device:
    """The GPU of this local rank, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", launcher_integer("LOCAL_RANK", 0))
    return torch.device("cpu")


def backend() -> str:
    """The ``torch.distributed`` backend for :func:`device`."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def has_fp8() -> bool:
    """Whether the GPU multiplies FP8 matrices: compute capability 8.9 (Ada, Hopper) and later."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device()) >= (8, 9)


def has_grouped_fp8() -> bool:
    """Whether torch's grouped FP8 product has a kernel for the GPU: compute capability 9.x and 10.x only."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device())[0] in (9, 10)


def driver_version() -> str:
    """Version of NVIDIA's driver as ``nvidia-smi`` reports it; ``unknown`` if it does not."""
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
    """Set the number of intra-op threads of this process and return it.

    ``count`` 0 divides the cores that this process may use among the ranks of this machine, so that CPU ranks do not
    compete for them.
    """
    if count == 0:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = max(1, cores // launcher_integer("LOCAL_WORLD_SIZE", 1, least=1))
    torch.set_num_threads(count)
    return count
