"""What comes next is made while the present is used: a thread reads, lays out and copies batches ahead of the steps."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Prefetch[T, U]:
    """``prepare(item)`` of each item, in order, made by one thread; ``with`` starts and ends it.

    What ``items`` or ``prepare`` raises is raised to whoever asks for that item, not before. Whoever goes on with fewer
    items than were made loses nothing that counts: an item is used when it is taken from here.

    Args:
        items: read by the thread alone from now on.
        depth: how many items may wait to be used.
    """

    def __init__(self, items: Iterator[T], prepare: Callable[[T], U], depth: int) -> None:
        self._items, self._prepare = items, prepare
        self._made: queue.Queue[_Made[U]] = queue.Queue(maxsize=depth)
        self._is_stopping = threading.Event()
        # A process that ends for another reason does not wait for it.
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)

    def __enter__(self) -> Prefetch[T, U]:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_stopping.set()
        while self._thread.is_alive():
            try:
                self._made.get(timeout=0.05)  # makes room for one who waits for it, and who then sees the event
            except queue.Empty:
                continue

    def __iter__(self) -> Iterator[U]:
        return self

    def __next__(self) -> U:
        item, error = self._made.get()
        if error is not None:
            self._made.put(_Made(None, error))  # the thread has ended: nothing else will ever come
            raise error
        return item

    def _work(self) -> None:
        try:
            while not self._is_stopping.is_set():
                self._made.put(_Made(self._prepare(next(self._items)), None))
        except BaseException as error:  # StopIteration, too
            self._made.put(_Made(None, error))


class _Made[U](NamedTuple):
    item: U | None
    error: BaseException | None
