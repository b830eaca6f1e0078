"""Graceful stop: after a signal, or the end of ``torchrun``, a run finishes its step and saves."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

from megatron_most.cli import STOP_SIGNALS
from megatron_most.processes import SPOKEN_FOR

_ONE_KEYSTROKE = 2.0
"""Seconds in which several SIGINT are one Ctrl-C: the terminal sends it to all processes, ``torchrun`` passes it on."""


class StopRequest:
    """True once the process has been asked to stop, or its ``torchrun`` has ended. Use it around a run.

    Requests are SIGTERM, SIGINT (Ctrl-C), SIGHUP (the terminal is gone; ignored as ever under ``nohup``), and SIGUSR1,
    with which batch systems announce the end of a job's time.

    A ``torchrun`` that is killed cannot stop its ranks, which would keep training unnoticed and hold the run directory.
    A process without ``torchrun`` may outlive its parent, for example a shell with ``nohup``.

    Only a second Ctrl-C interrupts at once. Launchers repeat signals and send others after them, so only a SIGINT that
    comes more than two seconds after the first SIGINT counts as the second.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._interrupted: float | None = None
        self._previous: dict[int, Any] = {}
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def __bool__(self) -> bool:
        if self.signal is None and self._launcher not in (None, os.getppid()):
            self.signal = "the loss of its launcher"
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted is not None and now - self._interrupted > _ONE_KEYSTROKE:
                raise KeyboardInterrupt
            self._interrupted = self._interrupted or now
        if self.signal is None:
            self.signal = signal.Signals(number).name
            if os.environ.get("RANK", "0") == "0" and SPOKEN_FOR not in os.environ:
                # Not print: the signal may have come in the middle of one.
                os.write(2, f"{self.signal}: finishing the step, then saving; a further Ctrl-C ends at once\n".encode())
