"""Shared by all tests: Megatron runs on the CPU here unless there is a GPU, and no test inherits another's groups."""

import functools
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels run on the CPU; it reads this when it is first imported

from megatron_most import platform

platform.install()

# A run in the background ("&", nohup) ignores these, and so would all processes that tests start and interrupt.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that fork ranks come first.

    Ranks are forked from this process, and gloo's device thread does not survive a fork: once a test has opened process
    groups here, ranks forked later would wait for ever.
    """
    items.sort(key=lambda item: not _forks_ranks(item.path))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Two workers: one begins with all tests that fork ranks, which fill the machine and are forked before any group is
    opened, and the other with the rest, a file at a time."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return "ranks" if _forks_ranks(config.rootpath / file) else file

    return ByFile(config, log)


@functools.cache
def _forks_ranks(file: Path) -> bool:
    return "run_ranks" in file.read_text(encoding="utf-8")


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
