"""A polite end: SIGTERM, Ctrl-C or the loss of the launcher finish the step and save, instead of losing it."""

from __future__ import annotations

import os
import signal
from types import FrameType


class StopRequest:
    """True once the process was asked to stop or its ``torchrun`` has died; install it around the training loop.

    A ``torchrun`` that is killed cannot end its ranks: they would train on, unseen, and keep the run directory. A
    process that was started without one may outlive its parent: a shell, with ``nohup``.

    A second Ctrl-C interrupts at once, whatever came between. ``torchrun`` forwards SIGTERM after a Ctrl-C that the
    ranks saw themselves, so a SIGTERM after a first request changes nothing; nor does a first Ctrl-C after a SIGTERM.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._is_interrupted = False
        self._previous: dict[int, object] = {}
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def __bool__(self) -> bool:
        if self.signal is None and self._launcher not in (None, os.getppid()):
            self.signal = "the loss of its launcher"
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._is_interrupted:
                raise KeyboardInterrupt
            self._is_interrupted = True
        self.signal = self.signal or signal.Signals(number).name
