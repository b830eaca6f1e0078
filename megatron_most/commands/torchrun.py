"""What the launchers start instead of torchrun: the same, but with an exit status that says how training ended.

    python -m megatron_most.commands.torchrun [torchrun's options] -m megatron_most.commands.train --config FILE.yaml

Options, environment (PET_*), and signals are torchrun's. Exit status: 0 when the ranks have finished, 75 when they were
asked to stop and have saved (torchrun itself: 1, with a traceback), otherwise torchrun's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from megatron_most import cli
from megatron_most.commands.train import STOPPED_FILE

_HANDLED, _BY_DEFAULT = "PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT"


def main(arguments: Sequence[str] | None = None) -> None:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.run import main as torchrun

    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup
        handled = os.environ.get(_HANDLED, _BY_DEFAULT).split(",")
        os.environ[_HANDLED] = ",".join(name for name in handled if name.strip() != "SIGHUP")
    with tempfile.TemporaryDirectory(prefix="most-") as folder:
        record = Path(os.environ.setdefault(STOPPED_FILE, f"{folder}/stopped"))
        status: int | None = None
        try:
            torchrun(arguments)
        except SignalException as error:
            _wait_for_ranks(error.sigval)
            status = 128 + error.sigval
        except BaseException:
            if not record.exists():
                raise
        if record.exists():
            status = cli.STOPPED
    sys.exit(status)


def _wait_for_ranks(number: int) -> None:
    """Let ranks save that torchrun left alone because it was signaled again while it waited for them."""

    def pass_on(number: int, frame: FrameType | None = None) -> None:
        for rank in _ranks():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank, number)

    for further in cli.STOP_SIGNALS:
        if signal.getsignal(further) != signal.SIG_IGN:
            signal.signal(further, pass_on)
    pass_on(number)
    end = time.monotonic() + float(os.environ.get("PET_SHUTDOWN_TIMEOUT", "30"))
    while _ranks() and time.monotonic() < end:
        time.sleep(0.1)
    pass_on(signal.SIGKILL)


def _ranks() -> list[int]:
    """Living children with a session of their own, which torchrun gives to its ranks."""
    found = []
    for child in Path("/proc/thread-self/children").read_text().split():
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            if os.getsid(int(child)) == int(child) and os.waitpid(int(child), os.WNOHANG) == (0, 0):
                found.append(int(child))
    return found


if __name__ == "__main__":
    main()
