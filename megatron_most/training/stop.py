"""Graceful stop: after SIGTERM, Ctrl-C, or the end of ``torchrun``, a run finishes its step and saves."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any


class StopRequest:
    """True once the process has been asked to stop, or its ``torchrun`` has ended. Use it around the training loop.

    A ``torchrun`` that is killed cannot stop its ranks, which would keep training unnoticed and hold the run directory.
    A process without ``torchrun`` may outlive its parent, for example a shell with ``nohup``.

    Only a second Ctrl-C interrupts at once. After a Ctrl-C, ``torchrun`` also sends SIGTERM to its ranks, so a SIGTERM
    after the first request is ignored, and so is a first Ctrl-C after a SIGTERM.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._is_interrupted = False
        self._previous: dict[int, Any] = {}
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
