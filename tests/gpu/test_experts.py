"""Grouped experts on a GPU against one expert after another in fp32 on the CPU, whatever the load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.gpu.comparison import relative_error
from tests.gpu.computations import LOADS, experts, leave_nan_in_memory

BANDS = {"fp32": 1e-5, "bf16": 1.5e-2}
"""Norm of a difference over the norm; bf16 is 0.5 % off on a CPU."""


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("dtype", BANDS)
@pytest.mark.parametrize("backend", ["grouped", "sequential"])
def test_output_and_gradients_are_the_cpus(backend: str, dtype: str, load: str, on_cpu: Callable[..., Any]) -> None:
    """An expert without tokens has a gradient of zeros: what the kernel leaves of its memory would show."""
    leave_nan_in_memory()
    found, wanted = experts(backend, LOADS[load], dtype), on_cpu("experts")[load]
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape, name
        assert not found[name].isnan().any(), name
        assert relative_error(found[name], tensor) < BANDS[dtype], name
