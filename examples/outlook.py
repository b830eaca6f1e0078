"""How long the quickstart still takes, said while a step runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

SOON, LATER = 10.0, 30.0
"""Seconds between two times that the outlook is said: in a step's first minute, in which programs load, and then."""

_ENOUGH = 20.0
"""Expected seconds of work that must be done before this machine's pace is judged."""


@dataclass
class Outlook:
    """Expected times of the steps, corrected by how long this machine has taken.

    Args:
        expected: seconds that all steps to do are expected to take.
        done: of these, what the steps that have ended were expected to take.
        spent: seconds that those steps took.
    """

    expected: float
    done: float = 0.0
    spent: float = 0.0

    def left(self, expected: float = 0.0, elapsed: float = 0.0, fraction: float | None = None) -> float:
        """Seconds left, ``elapsed`` seconds into a step that was expected to take ``expected`` seconds.

        Args:
            fraction: how much of the step is done, where it can be known.
        """
        pace = self.spent / self.done if self.done >= _ENOUGH else 1.0
        if fraction is None:
            fraction = min(elapsed / (expected * pace), 0.95) if expected else 1.0
        done = self.done + fraction * expected
        if done >= _ENOUGH:
            pace = (self.spent + elapsed) / done
        return pace * (self.expected - done)

    def end(self, expected: float, elapsed: float) -> None:
        """A step has ended."""
        self.done += expected
        self.spent += elapsed


class Ticker:
    """Calls ``say`` now and then (:data:`SOON`, :data:`LATER`) with the seconds since the block began."""

    def __init__(self, say: Callable[[float], None]) -> None:
        self._say = say
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        began, elapsed = time.monotonic(), 0.0
        while not self._ended.wait(SOON if elapsed < 60 else LATER):
            elapsed = time.monotonic() - began
            self._say(elapsed)

    def __enter__(self) -> Ticker:
        self._thread.start()
        return self

    def stop(self) -> None:
        """Say nothing from now on."""
        self._ended.set()

    def __exit__(self, *exception: object) -> None:
        self.stop()
        self._thread.join()


def about(seconds: float) -> str:
    """``about 4 minutes``, or ``less than a minute``."""
    minutes = round(seconds / 60)
    return f"about {minutes} minute{'s' if minutes > 1 else ''}" if minutes else "less than a minute"
