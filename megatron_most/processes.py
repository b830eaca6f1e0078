"""Child processes that leave calmly when their parent is interrupted, and never go on without it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

SPOKEN_FOR = "MOST_SPOKEN_FOR"
"""Environment variable of processes that leave an interrupt to their parent to report: a user sees one line."""

INTERRUPTED = 128 + signal.SIGINT
"""Exit status after Ctrl-C, as shells expect it."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None)


def call(
    command: Sequence[str],
    *,
    cwd: str | Path | None = None,
    environment: Mapping[str, str] | None = None,
    on_interrupt: Callable[[], None],
) -> int:
    """Run a command to its end and return its status.

    The terminal's Ctrl-C reaches this process alone, which asks the command to stop and waits for it; Ctrl-C again
    kills it.

    Args:
        environment: the command's (default: this process's).
        on_interrupt: called at Ctrl-C, before the command is asked to stop.

    Raises:
        SystemExit: after Ctrl-C, with status :data:`INTERRUPTED`, once the command has ended.
    """
    inherited = os.environ if environment is None else environment
    # A process group of its own: the terminal interrupts only the group in the foreground.
    process = subprocess.Popen(
        command, cwd=cwd, env={**inherited, SPOKEN_FOR: "1"}, process_group=0, preexec_fn=end_with_parent
    )
    try:
        return process.wait()
    except KeyboardInterrupt:
        on_interrupt()
        process.send_signal(signal.SIGINT)
        try:
            process.wait()
        except KeyboardInterrupt:
            process.kill()
            process.wait()
        raise SystemExit(INTERRUPTED) from None


def end_with_parent() -> None:
    """Have the kernel send SIGTERM to this child (``preexec_fn``) when its parent is gone, however that was ended."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def deaf_children(*signals: signal.Signals) -> Iterator[None]:
    """Processes that are started in this block ignore these signals, until they set handlers of their own.

    In the main thread this process ignores them, too, for as long as the block takes; in others nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in signals}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
