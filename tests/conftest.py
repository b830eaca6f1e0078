"""Shared by all tests: Megatron runs on the CPU here unless there is a GPU, and no test inherits another's groups."""

import os
import sys
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels run on the CPU; it reads this when it is first imported

from megatron_most import platform

platform.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that fork ranks come first.

    Ranks are forked from this process, and gloo's device thread does not survive a fork: once a test has opened process
    groups here, ranks forked later would wait for ever.
    """
    items.sort(key=lambda item: not hasattr(item.module, "run_ranks"))


@pytest.fixture(autouse=True, scope="module")
def _no_process_groups_left() -> Iterator[None]:
    """Ranks are forked from this process and must not find groups whose peers they are not."""
    yield
    if "megatron_most.parallel" in sys.modules:
        from megatron_most import parallel

        parallel.destroy()


@pytest.fixture(autouse=True)
def own_scale_of_auxiliary_losses() -> None:
    """Megatron keeps it in a class, in the shape of the first value it was given: forget that of another test."""
    module = sys.modules.get("megatron.core.transformer.moe.moe_utils")
    if module is not None:
        module.MoEAuxLossAutoScaler.main_loss_backward_scale = None
