"""What came of a run on a bare machine, also where steps of it hung or died: one JSON file of every test and step.

As a pytest plugin it writes what happens as it happens, a line of JSON at a time:

    pytest -p tests.gpu.results --events FILE.jsonl ...

As a program it sums up a folder of such files and of ``steps.tsv`` (name, exit status, seconds, limit):

    python tests/gpu/results.py FOLDER >results.json

A test that was begun and never ended is "stopped", one that was never begun "not run". Imports nothing but Python's
own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_STOPPED = 124
"""Exit status of timeout(1) for what ran past its limit; it is 137 where that had to be killed."""


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--events", metavar="FILE", help="write what happens to this file, as it happens")


def pytest_configure(config: Any) -> None:
    if file := config.getoption("events"):
        config.pluginmanager.register(_Events(Path(file)))


class _Events:
    def __init__(self, file: Path) -> None:
        self._stream = file.open("a", buffering=1)  # a line at a time, so that nothing is lost with the process

    def _write(self, **event: Any) -> None:
        self._stream.write(json.dumps(event) + "\n")

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._write(test=report.nodeid, outcome="error", why=_last_line(report.longreprtext))

    def pytest_collection_finish(self, session: Any) -> None:
        for item in session.items:
            self._write(test=item.nodeid, outcome="not run")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(test=nodeid, outcome="stopped", why="it was running when its process ended")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            outcome = "error" if report.failed and report.when != "call" else report.outcome
            why = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ""
            why = why.removeprefix("Skipped: ") or _last_line(report.longreprtext)
            self._write(test=report.nodeid, outcome=outcome, seconds=round(report.duration, 2), why=why)


def _last_line(text: str) -> str:
    """Of a traceback: the first line that pytest marks as the error, else the last one."""
    lines = text.strip().splitlines() or [""]
    return next((line[1:].strip() for line in lines if line.startswith("E ")), lines[-1])[:400]


def summary(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """``steps`` in the order they ended, and ``tests`` by suite (the file's name), each with its last known outcome."""
    steps = []
    table = folder / "steps.tsv"
    for line in table.read_text().splitlines() if table.exists() else []:
        name, status, seconds, limit = line.split("\t")
        step: dict[str, Any] = {"step": name, "status": int(status), "seconds": int(seconds), "limit": int(limit)}
        if int(status) in (_STOPPED, _STOPPED + 13):
            step["why"] = "stopped at its limit"
        steps.append(step)
    tests: dict[tuple[str, str], dict[str, Any]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            event = json.loads(line)
            tests[file.stem, event["test"]] = {"suite": file.stem, **event}
    return {"steps": steps, "tests": list(tests.values())}


if __name__ == "__main__":
    print(json.dumps(summary(Path(sys.argv[1])), indent=1))
