"""How far a long piece of work is: a tqdm bar on a terminal, a line every 5 seconds in a log."""

from __future__ import annotations

import sys

from tqdm import tqdm

_COUNTS = "{n_fmt}/{total_fmt}{unit}{postfix}, {rate_noinv_fmt}"
_BAR = "{l_bar}{bar}| " + _COUNTS + " [{elapsed}<{remaining}]"
_LINE = "{desc}: " + _COUNTS + ", {remaining} left"
_LAST_LINE = "{desc}: " + _COUNTS + " in {elapsed}"


class Progress:
    """Written to standard error; :meth:`close` leaves a last line with the total and the speed.

    As a context manager it closes at the end of the block; after an error it leaves nothing.

    Args:
        what: the work, in one word.
        total: units of work.
        unit: follows the numbers: ``" files"``; ``"B"`` is shown as MB and GB.
        initial: units that an earlier run did. They do not count towards the speed.
        enabled: False on ranks that show nothing.
    """

    def __init__(self, what: str, total: int, unit: str, *, initial: int = 0, enabled: bool = True) -> None:
        self._is_terminal = sys.stderr.isatty()
        self.interval = 1.0 if self._is_terminal else 5.0
        self._bar = tqdm(
            total=total,
            initial=initial,
            desc=what,
            unit=unit,
            unit_scale=unit == "B",
            bar_format=_BAR if self._is_terminal else _LINE,
            dynamic_ncols=self._is_terminal,
            file=sys.stderr if self._is_terminal else _Lines(),
            mininterval=self.interval,
            miniters=0,  # only the interval decides
            smoothing=0,  # the mean speed
            disable=not enabled,
        )

    def add(self, count: int, note: str = "") -> None:
        """``count`` more units are done; ``note`` replaces what stands behind the numbers."""
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)

    def close(self) -> None:
        if not self._is_terminal:
            self._bar.bar_format = _LAST_LINE
        self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.leave = kind is None
        self.close()


class _Lines:
    """A stream that gives tqdm a new line where it would rewrite the last one."""

    def write(self, text: str) -> None:
        if words := text.split():
            print(*words, file=sys.stderr, flush=True)

    def flush(self) -> None:
        sys.stderr.flush()
