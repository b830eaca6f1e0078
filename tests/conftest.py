"""Shared by all tests: Megatron runs on the CPU here unless there is a GPU, and no test inherits another's groups."""

import sys
from collections.abc import Iterator

import pytest

from megatron_most import platform

platform.install()


@pytest.fixture(autouse=True, scope="module")
def _no_process_groups_left() -> Iterator[None]:
    """Ranks are forked from this process and must not find groups whose peers they are not."""
    yield
    if "megatron_most.parallel" in sys.modules:
        from megatron_most import parallel

        parallel.destroy()
