"""A process of its own that converts and reports its peak of anonymous memory.

    python conversion_memory.py import HF OUT | verified-import HF OUT | export CHECKPOINT OUT

Prints ``{"peak": bytes, "before": bytes, "seconds": float}`` as the last line; ``before`` is what the imports take.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from pathlib import Path


def anonymous_memory() -> int:
    """Bytes of memory that no file stands behind, now."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


class Peak:
    """The highest :func:`anonymous_memory` while it runs, looked at 200 times a second."""

    def __enter__(self) -> Peak:
        self.before = self.highest = anonymous_memory()
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.highest = max(self.highest, anonymous_memory())

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._watcher.join()


def main() -> None:
    from megatron_most import platform
    from megatron_most.conversion import ImportOptions, export_model, import_model

    platform.install()
    kind, source, out = sys.argv[1:]
    verify = kind == "verified-import"
    if verify:
        import transformers  # noqa: F401  # before the peak is taken: it is no part of the model's memory
    with Peak() as peak:
        began = time.perf_counter()
        if kind == "export":
            export_model(source, out, "deepseek-v2", experts="all", verify=False)
        else:
            import_model(source, out, ImportOptions("partition", "frame:4x4032", verify=verify))
        seconds = time.perf_counter() - began
    print(json.dumps({"peak": peak.highest, "before": peak.before, "seconds": seconds}))


if __name__ == "__main__":
    main()
