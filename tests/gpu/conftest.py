"""Tests that compare a GPU with the CPU: skipped, with the reason, where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_most import parallel
from tests.distributed.tiny import tiny_config
from tests.gpu import hardware

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
SECONDS = int(os.environ.get("GPU_TEST_SECONDS", "600"))
"""A test's time limit: the first ones wait for kernels that are compiled and for the CPU's numbers."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = hardware.missing(hardware.CUDA)
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.timeout(SECONDS))
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True, scope="module")
def process_groups() -> Iterator[None]:
    parallel.initialize(tiny_config().parallel, seed=1)
    yield
    parallel.destroy()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Weights and inputs have generators of their own; this is for what has none. And fp32 means fp32."""
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="session")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """``on_cpu(name, *arguments)``: what ``tests.gpu.reference`` computes in a process that sees no GPU.

    Megatron runs either on CUDA or, with our stand-ins for it, on the CPU: not on both in one process.
    """
    folder = tmp_path_factory.mktemp("cpu")
    results: dict[tuple, Any] = {}

    def compute(name: str, *arguments: str) -> Any:
        key = (name, *arguments)
        if key not in results:
            file = folder / f"{len(results)}.pt"
            # A process group of its own, not this process's.
            hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
            environment = {key: value for key, value in os.environ.items() if key not in hidden}
            subprocess.run(
                [sys.executable, "-m", "tests.gpu.reference", str(file), *key],
                cwd=ROOT,
                env={**environment, "CUDA_VISIBLE_DEVICES": ""},
                check=True,
            )
            results[key] = torch.load(file, weights_only=True)
        return results[key]

    return compute
