"""Errors on some ranks become one error of the whole job: no rank is left waiting, and one line is printed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import NoReturn

import torch.distributed as dist

from megatron_most.errors import MostError


def together[T](action: Callable[[], T]) -> T:
    """Run ``action`` on every rank; when it raises a :class:`MostError` on any, every rank stops. A collective call.

    The lowest rank that failed raises its error, the others leave with status 1, so that the user reads one line.
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
    """Run ``action`` on rank 0 alone and give its (picklable) result to every rank; errors as in :func:`together`."""
    result = [together(lambda: action() if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(result, src=0)
    return result[0]  # type: ignore[return-value]


def fail(error: MostError | None) -> NoReturn:
    """Raise ``error``, or leave with status 1 on the ranks that have none to tell."""
    if error is not None:
        raise error
    # torchrun ends all ranks as soon as one is gone: let the one with the error tell it first.
    time.sleep(1)
    sys.exit(1)
