"""The progress of tokenization on one line: rewritten every second on a terminal, printed every 5 s elsewhere."""

from __future__ import annotations

import sys
import time


class Progress:
    """Files, hours of audio, hours an hour, rejected files and the time left.

    Args:
        total: files of this job.
        already_done: those of them that an earlier run did.
    """

    def __init__(self, total: int, already_done: int) -> None:
        self._total, self._already_done = total, already_done
        self._terminal = sys.stderr.isatty()
        self.interval = 1.0 if self._terminal else 5.0
        self._started = self._shown = time.monotonic()

    def show(self, files: int, seconds: float, rejected: int, *, last: bool = False) -> None:
        """``files``, ``rejected`` ones and ``seconds`` of audio since the start; says so when it is time to."""
        now = time.monotonic()
        if now - self._shown < self.interval and not last:
            return
        self._shown, elapsed = now, now - self._started
        done = self._already_done + files
        line = f"tokenize: {done}/{self._total} files, {seconds / 3600:.2f} h of audio at {seconds / elapsed:.0f} h/h"
        if rejected:
            line += f", {rejected} rejected"
        if files and not last:
            line += f", {(self._total - done) * elapsed / files:.0f} s left"
        if self._terminal:
            print(f"\r\x1b[K{line}", end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
