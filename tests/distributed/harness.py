"""Ranks for tests: gloo processes forked from this one, which has paid for the imports already."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import multiprocessing.connection
import os
import random
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from megatron_most import parallel, platform
from megatron_most.model import build_model  # noqa: F401  (imported here so that ranks inherit it)

platform.install()


def run_ranks(world_size: int, function: Callable, *args: Any, timeout: float = 120) -> list[Any]:
    """Call ``function(*args)`` on ``world_size`` ranks that share a fresh torch.distributed address.

    Returns:
        What each rank returned, in rank order (tensors travel by value).

    Raises:
        RuntimeError: with the traceback of the first rank that failed.
        TimeoutError: when a rank has not finished after ``timeout`` seconds; all ranks are killed then.
    """
    assert not torch.distributed.is_initialized(), "ranks cannot be forked from a process that is a rank itself"
    context = multiprocessing.get_context("fork")
    port = free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    ranks = [
        context.Process(target=_rank, args=(rank, world_size, port, pipes[rank][1], function, args))
        for rank in range(world_size)
    ]
    for rank, (_, sender) in zip(ranks, pipes, strict=True):
        rank.start()
        sender.close()
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    try:
        while len(results) < world_size:
            receivers = [pipes[rank][0] for rank in range(world_size) if rank not in results]
            ready = multiprocessing.connection.wait(receivers, max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"{world_size - len(results)} of {world_size} ranks did not finish in {timeout} s")
            for receiver in ready:
                rank = next(index for index, pipe in enumerate(pipes) if pipe[0] is receiver)
                try:
                    failure, payload = receiver.recv()
                except EOFError:
                    failure, payload = f"rank {rank} died without a word", None
                if failure:
                    raise RuntimeError(f"rank {rank} failed:\n{failure}")
                results[rank] = torch.load(io.BytesIO(payload), weights_only=False)
    finally:
        for process in ranks:
            process.join(5 if len(results) == world_size else 0)
            if process.is_alive():
                process.kill()
                process.join()
    return [results[rank] for rank in range(world_size)]


def _rank(rank: int, world_size: int, port: int, sender: Any, function: Callable, args: tuple) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        payload = io.BytesIO()
        torch.save(function(*args), payload)
        sender.send((None, payload.getvalue()))
        parallel.destroy()
    except BaseException:
        sender.send((traceback.format_exc(), None))
    # The forked copy of the test runner must not run its exit handlers.
    os._exit(0)


def free_port() -> int:
    """A port below those that the system gives to connections, which ranks of other tests open by the hundred."""
    for port in random.SystemRandom().sample(range(20_000, 30_000), 100):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no port is free")
