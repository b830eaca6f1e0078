"""pytest plugin: the CPU takes the GPU's place, so that what the suite does beside the device is tested without one.

    pytest -p tests.gpu.pretend -m gpu tests/gpu

Tests that need FP8 or Transformer Engine stay skipped.
"""

from __future__ import annotations

import pytest

from megatron_most import platform
from tests.gpu import hardware


def pytest_configure(config: pytest.Config) -> None:
    """Before the tests are imported, which ask for their hardware then."""
    platform.install()
    hardware.missing = lambda what: None if what == hardware.CUDA else f"the CPU in the GPU's place has no {what}"
