"""Start the ranks of a command with PyTorch's torchrun: its options, environment variables (PET_*) and signals.

    most torchrun --nproc-per-node 8 -m megatron_most.commands.train --config FILE.yaml [key=value ...]
    most torchrun --nproc-per-node 8 -m megatron_most.commands.convert import ...

What differs from torchrun itself: an error in the configuration of a training run is reported before any rank starts;
when ranks fail, the last line is the error of the first of them; an interrupt is one line; ranks that are asked to stop
have 600 seconds to save (PET_SHUTDOWN_TIMEOUT). Exit status: 0 when the ranks have finished, 75 when they were asked to
stop and have saved, 1 when they have failed, 128 + N after signal N without saving. torchrun --help lists the options.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from megatron_most import cli
from megatron_most.commands import train
from megatron_most.errors import MostError
from megatron_most.processes import SPOKEN_FOR

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

_HANDLED, _TIMEOUT, _LOGS = "PET_SIGNALS_TO_HANDLE", "PET_SHUTDOWN_TIMEOUT", "PET_LOG_DIR"
_SAVE_SECONDS = "600"
"""How long ranks that are asked to stop may take to finish their step and save, where the user does not say so."""


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser("torchrun", __doc__)
    parser.usage = "most torchrun [-h] [--debug] [torchrun's options] (-m MODULE | SCRIPT) ..."
    return parser


def torchrun(given: Sequence[str], arguments: argparse.Namespace) -> None:
    """Start the ranks that ``given``, torchrun's command line, describes, and wait for them.

    Raises:
        MostError: the configuration of a training run is wrong, or ranks have failed.
        SystemExit: otherwise, with the status.
    """
    _make_quiet()
    from torch.distributed import run as launcher
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    with tempfile.TemporaryDirectory(prefix="most-") as folder:
        os.environ.setdefault(_LOGS, f"{folder}/logs")  # torchrun itself makes folders and leaves them
        _check_configuration(given)
        _set_signals()
        record = Path(os.environ.setdefault(train.STOPPED_FILE, f"{folder}/stopped"))
        record.unlink(missing_ok=True)  # of an earlier run: ranks may fail before they remove it
        status: int | None = None
        try:
            launcher.main(list(given))
        except SignalException as error:
            _wait_for_ranks(error.sigval)
            status = 128 + error.sigval
        except BaseException as error:
            if not record.exists():
                if isinstance(error, ChildFailedError):
                    raise MostError(root_cause(error)) from None
                raise
        if record.exists():
            status = cli.STOPPED
        elif status is not None and SPOKEN_FOR not in os.environ:
            number = signal.Signals(status - 128)
            print("interrupted" if number == signal.SIGINT else f"stopped by {number.name}", file=sys.stderr)
    sys.exit(status)


def _make_quiet() -> None:
    """Leave out what torchrun says about threads, about each rank that it stops, and about its own error file."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # what it sets itself, with five lines
    os.environ.setdefault("LOGLEVEL", "ERROR")  # of some of its loggers; the others are below this one
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    logging.getLogger("torch.distributed.elastic.multiprocessing.errors").setLevel(logging.CRITICAL)


def _set_signals() -> None:
    """Pass all signals on that ask training to stop, and give it time to save."""
    os.environ.setdefault(_TIMEOUT, _SAVE_SECONDS)
    # SIGUSR1, which batch systems send before the time of a job is over, would otherwise end torchrun.
    all_signals = ",".join(number.name for number in (*cli.STOP_SIGNALS, signal.SIGQUIT))
    handled = os.environ.get(_HANDLED, all_signals).split(",")
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup
        handled = [name for name in handled if name.strip() != "SIGHUP"]
    os.environ[_HANDLED] = ",".join(handled)


def _check_configuration(given: Sequence[str]) -> None:
    """Read the configuration of a training run here, once, before each rank does."""
    from torch.distributed import run as launcher

    if train.__name__ not in given:
        return
    options = launcher.parse_args(list(given))
    if options.module and options.training_script == train.__name__:
        settings, _, _ = launcher.config_from_args(options)
        is_fixed = settings.min_nodes == settings.max_nodes
        parsed = cli.parse(train.make_parser(), options.training_script_args)
        train.check_config(parsed, settings.max_nodes * settings.nproc_per_node if is_fixed else None)


def root_cause(error: ChildFailedError) -> str:
    """One line about the rank that failed first: its own words if it left any, else how it ended."""
    told = {rank: failure for rank, failure in error.failures.items() if isinstance(failure.message, dict)}
    failures = told or error.failures
    rank = min(failures, key=lambda rank: (failures[rank].timestamp, rank))
    failure = failures[rank]
    if isinstance(failure.message, dict):
        return f"rank {rank}: {failure.message['message']}"
    if failure.exitcode < 0:
        return f"rank {rank}: was ended by signal {-failure.exitcode} ({failure.signal_name()})"
    return f"rank {rank}: ended with status {failure.exitcode}; see its output above"


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
    end = time.monotonic() + float(os.environ[_TIMEOUT])
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


def main(arguments: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else list(arguments)
    own = [argument for argument in given[:1] if argument in ("-h", "--help", "--debug")]  # the rest is torchrun's
    cli.run(make_parser(), functools.partial(torchrun, given[len(own) :]), own)


if __name__ == "__main__":
    main()
