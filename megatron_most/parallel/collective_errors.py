"""Turns errors on some ranks into one error of the whole job: no rank hangs, and one line is printed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import NoReturn

import torch.distributed as dist

from megatron_most.cli import tell_torchrun
from megatron_most.errors import MostError


def together[T](action: Callable[[], T]) -> T:
    """Run ``action`` on every rank. If it raises a :class:`MostError` on any rank, all ranks stop. A collective call.

    The lowest rank that failed raises its error and the others exit with status 1, so that the user sees one line.
    ``action`` must not communicate: a rank that fails inside would leave the others waiting.
    """
    error: MostError | None = None
    result = None
    try:
        result = action()
    except MostError as caught:
        error = caught
    failed = [False] * dist.get_world_size()
    dist.all_gather_object(failed, error is not None)
    if any(failed):
        fail(error if failed.index(True) == dist.get_rank() else None)
    return result  # type: ignore[return-value]


def on_rank_zero[T](action: Callable[[], T]) -> T:
    """Run ``action`` only on rank 0 and send its (picklable) result to every rank. Errors as in :func:`together`."""
    result = [together(lambda: action() if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(result, src=0)
    return result[0]  # type: ignore[return-value]


def fail(error: MostError | None, unless_told: str = "") -> NoReturn:
    """Raise ``error``, or exit with status 1 on a rank that has none.

    Args:
        unless_told: what a rank without an error leaves for ``torchrun``, in case no other rank raises one.
    """
    if error is not None:
        raise error
    # torchrun kills all ranks as soon as one exits: let the rank with the error print it first.
    time.sleep(1)
    if unless_told:
        tell_torchrun(unless_told)
    sys.exit(1)
