"""Says where every rank is when a run no longer moves, before the waiting ranks end it."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch.distributed as dist

from megatron_most.cli import launcher_integer
from megatron_most.errors import MostError
from megatron_most.training.prefetch import THREAD as LOADER

STACKS = "stacks"
REQUEST = "request"
WAITING_FOR_DATA = "waiting for data"
_PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"
_MOST_GROUPS = 8
"""Groups of ranks that one line describes; the files have the rest."""


class Place(NamedTuple):
    """Where a rank runs."""

    host: str
    process: int
    is_shown: bool
    """Whether launchers show the output of the rank: that of the first rank of each node."""

    @classmethod
    def here(cls) -> Place:
        return cls(socket.gethostname(), os.getpid(), launcher_integer("LOCAL_RANK", 0) == 0)


class Progress(NamedTuple):
    """What a rank does, and since when."""

    step: int
    phase: str
    is_long: bool
    since: float


class Watchdog:
    """A thread that notices when its rank stays in one phase for long. Use it as a context manager.

    After half of ``timeout`` (three quarters in phases that may be long), the thread writes the Python stacks of all
    threads of the process to ``<run_dir>/stacks/rank-N.txt``, and so do the watchdogs of all other ranks: a file
    ``request`` in that folder tells them. One rank then says in one line which ranks are where. The thread never ends
    the run: the rank that waits does, after ``timeout``.

    A process that never lets Python switch threads writes its stacks to standard error instead, from a thread of
    :mod:`faulthandler`. One that is stopped (``SIGSTOP``, or in the kernel) writes nothing, and the others name it.

    Args:
        places: of every rank.
        say: prints the line.
    """

    def __init__(
        self,
        rank: int,
        places: list[Place],
        run_dir: Path,
        timeout: timedelta,
        say: Callable[[str], None] = lambda line: print(line, flush=True),
    ) -> None:
        self._rank, self._places, self._say = rank, places, say
        self._folder = run_dir / STACKS
        self._seconds = timeout.total_seconds()
        self._period = min(15.0, self._seconds / 40)
        self._progress = Progress(0, "starting", True, time.monotonic())
        self._reported: Progress | None = None
        self._answered = self._requested()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._ended.set()
        self._thread.join(5)  # it may hang in the file system, too
        faulthandler.cancel_dump_traceback_later()
        if error is not None and not isinstance(error, MostError):
            minutes = f"parallel.distributed_timeout_minutes={self._seconds / 60:g}"
            hung = f"; no progress within {minutes}; stacks of all ranks: {self._folder}"
            is_hung = self._reported is self._progress and self._is_stuck(self._progress)
            error.add_note(self.where() + (hung if is_hung else ""))

    def enter(self, step: int, phase: str, is_long: bool = False) -> None:
        """A phase begins. Costs less than a microsecond.

        Args:
            step: the step that is being taken; 0 before the first.
            is_long: it may take long although nothing is wrong.
        """
        self._progress = Progress(step, phase, is_long, time.monotonic())

    def where(self) -> str:
        """Rank, step and phase, for a message."""
        return f"rank {self._rank}, {_where(self._progress)}"

    def _watch(self) -> None:
        while not self._ended.wait(self._period):
            # Fires only if this thread does not come back in time to set it anew.
            faulthandler.dump_traceback_later(self._seconds / 2, file=2)
            now = self._progress
            is_stuck = self._is_stuck(now)
            is_asked = self._requested() != self._answered
            if (is_stuck and now is not self._reported) or is_asked:
                self._reported = now
                seconds = time.monotonic() - now.since
                self._report(now, f"no progress for {seconds:.0f} s" if is_stuck else "asked for stacks")

    def _is_stuck(self, now: Progress) -> bool:
        return time.monotonic() - now.since > self._seconds * (0.75 if now.is_long else 0.5)

    def _report(self, now: Progress, why: str) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._requested() == self._answered:
                (self._folder / REQUEST).touch()
            written = self._write_stacks(now)
        except OSError as error:
            self._say(f"warning: {self.where()}: {why}; its stacks cannot be written: {error}")
            return
        known = self._known(written)
        end = time.monotonic() + 4 * self._period
        while len(known) < len(self._places) and time.monotonic() < end and not self._ended.wait(self._period / 4):
            known = self._known(written)
        self._answered = self._requested()  # several ranks may have noticed at once
        if self._rank == min(known, key=lambda rank: (not self._places[rank].is_shown, rank)):
            self._say(f"warning: {why}: {self._summary(known)}; stacks: {self._folder}")

    def _write_stacks(self, now: Progress) -> float:
        """Write this rank's file and return its time of modification, by the clock of the file system."""
        path, temporary = self._path(self._rank), self._folder / f".rank-{self._rank}.tmp"
        place, seconds = self._places[self._rank], time.monotonic() - now.since
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(f"rank {self._rank}, {_where(now)}{_line_of(now)}\n")
            file.write(f"for {seconds:.0f} s at {datetime.now():%Y-%m-%d %H:%M:%S}\n")
            file.write(f"process {place.process} on {place.host}\n\n")
            file.flush()
            faulthandler.dump_traceback(file)
        temporary.rename(path)
        return path.stat().st_mtime

    def _known(self, written: float) -> dict[int, str]:
        """What the ranks that have written their stacks by now were doing."""
        found = {}
        for rank in range(len(self._places)):
            with contextlib.suppress(OSError):
                if self._path(rank).stat().st_mtime > written - self._seconds / 4:
                    with open(self._path(rank), encoding="utf-8") as file:
                        found[rank] = re.sub(r"^rank \d+, ", "", file.readline().strip())
        return found

    def _summary(self, known: dict[int, str]) -> str:
        """Where the ranks are, in one line, the smallest group first: it is the one to look at."""
        groups: dict[str, list[int]] = {}
        for rank, where in known.items():
            groups.setdefault(where, []).append(rank)
        ordered = sorted(groups.items(), key=lambda group: (len(group[1]), group[1]))
        said = [
            f"rank {rank} does not answer (process {place.process} on {place.host})"
            for rank, place in enumerate(self._places)
            if rank not in known
        ]
        said += [f"{_ranks(ranks)}: {where}" for where, ranks in ordered]
        further = [f"and {len(said) - _MOST_GROUPS} more"] if len(said) > _MOST_GROUPS else []
        return "; ".join(said[:_MOST_GROUPS] + further)

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.txt"

    def _requested(self) -> int:
        """When stacks were last asked for; 0 for never."""
        try:
            return (self._folder / REQUEST).stat().st_mtime_ns
        except OSError:
            return 0


def gathered_places() -> list[Place]:
    """Where every rank runs. Collective."""
    places: list[Place] = [Place.here()] * dist.get_world_size()
    dist.all_gather_object(places, Place.here())
    return places


def _where(now: Progress) -> str:
    return f"step {now.step}, {now.phase}"


def _line_of(now: Progress) -> str:
    """The line of this package where the thread is that the phase waits for; empty if there is none."""
    wanted = LOADER if now.phase == WAITING_FOR_DATA else threading.main_thread().name
    threads = {thread.name: thread.ident for thread in threading.enumerate()}
    frame: FrameType | None = sys._current_frames().get(threads.get(wanted) or 0)
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    if frame is None:
        return ""
    return f" at {frame.f_code.co_filename.removeprefix(_PACKAGE)}:{frame.f_lineno} ({frame.f_code.co_name})"


def _ranks(ranks: list[int]) -> str:
    """``[0, 2, 3, 4]`` -> ``ranks 0, 2-4``."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][-1] + 1:
            spans[-1][1:] = [rank]
        else:
            spans.append([rank])
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join("-".join(map(str, span)) for span in spans)
