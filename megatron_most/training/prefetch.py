"""Prepares the next items in a background thread: reading, collating, and copying batches ahead of the steps."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

THREAD = "prefetch"
_JOIN_SECONDS = 5.0


class Prefetch[T, U]:
    """Iterates over ``prepare(item)`` of each item, in order, computed by one thread. Use it as a context manager.

    An exception of ``items`` or ``prepare`` is raised when the consumer asks for that item.

    Args:
        items: only the thread may read it from now on.
        depth: how many prepared items may wait.
        timeout: seconds to wait for an item; None for ever.
    """

    def __init__(self, items: Iterator[T], prepare: Callable[[T], U], depth: int, timeout: float | None = None) -> None:
        self._items, self._prepare, self._timeout = items, prepare, timeout
        self._ready: queue.Queue[_Item[U] | _End] = queue.Queue(maxsize=depth)
        self._is_stopping = threading.Event()
        # A daemon, so that a failing process does not wait for it.
        self._thread = threading.Thread(target=self._work, name=THREAD, daemon=True)

    def __enter__(self) -> Prefetch[T, U]:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_stopping.set()
        end = time.monotonic() + _JOIN_SECONDS  # a thread that hangs in a file system is left behind
        while self._thread.is_alive() and time.monotonic() < end:
            try:
                self._ready.get(timeout=0.05)  # makes room: a waiting put() returns, and the thread sees the event
            except queue.Empty:
                continue

    def __iter__(self) -> Iterator[U]:
        return self

    def __next__(self) -> U:
        """The next item.

        Raises:
            TimeoutError: there is none after ``timeout`` seconds.
        """
        try:
            entry = self._ready.get(timeout=self._timeout)
        except queue.Empty:
            raise TimeoutError from None
        if isinstance(entry, _End):
            self._ready.put(entry)  # the thread has ended: every further call gets the same
            raise entry.error
        return entry.value

    def _work(self) -> None:
        try:
            while not self._is_stopping.is_set():
                self._ready.put(_Item(self._prepare(next(self._items))))
        except BaseException as error:  # including StopIteration
            self._ready.put(_End(error))


class _Item[U](NamedTuple):
    value: U


class _End(NamedTuple):
    error: BaseException
