"""Progress of a conversion: a bar on a terminal, and one line at the end."""

from __future__ import annotations

import time

from tqdm import tqdm


class Progress:
    """A progress bar over ``total`` bytes. ``enabled`` is False on ranks that print nothing."""

    def __init__(self, what: str, total: int, enabled: bool = True) -> None:
        self._what, self._total, self._enabled = what, total, enabled
        # None: no bar where the output is no terminal.
        disable = None if enabled else True
        self._bar = tqdm(total=total, desc=what, unit="B", unit_scale=True, dynamic_ncols=True, disable=disable)
        self._began = time.perf_counter()

    def add(self, num_bytes: int) -> None:
        self._bar.update(num_bytes)

    def done(self) -> None:
        """Call when everything is on disk."""
        self._bar.close()
        if self._enabled:
            seconds = time.perf_counter() - self._began
            rate = self._total / max(seconds, 1e-9) / 1e9
            print(f"{self._what}: {self._total / 1e9:.3f} GB in {seconds:.1f} s, {rate:.2f} GB/s", flush=True)
