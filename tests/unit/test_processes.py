"""Child processes: calm after Ctrl-C, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_most import processes

SAVES = """
import pathlib, signal, sys, time
def save(number, frame):
    time.sleep(0.2)
    pathlib.Path(sys.argv[1], "stopped").write_text(signal.Signals(number).name)
    sys.exit(7)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, save if "deaf" not in sys.argv else signal.SIG_IGN)
pathlib.Path(sys.argv[1], "started").touch()
time.sleep(60)
"""
PARENT = """
import sys
from megatron_most import processes
status = processes.call(
    [sys.executable, "-c", *sys.argv[1:]], on_interrupt=lambda: print("one line", file=sys.stderr, flush=True)
)
print("status", status)
"""


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)


@pytest.fixture
def parent(tmp_path):
    """Starts a process that calls :data:`SAVES`, in a group as of a terminal's foreground."""
    started = []

    def start(*arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-c", PARENT, SAVES, str(tmp_path), *arguments]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        wait_for(tmp_path / "started")
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


def test_a_status_is_returned_and_the_environment_handed_on(tmp_path):
    script = "import os, sys; sys.exit(4 * (os.environ['A'] == 'b') + len(os.environ['MOST_SPOKEN_FOR']))"
    environment = {**os.environ, "A": "b"}
    assert processes.call([sys.executable, "-c", script], environment=environment, on_interrupt=lambda: None) == 5


def test_ctrl_c_is_said_once_and_waits_for_the_child(parent, tmp_path):
    process = parent()
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "one line\n")
    assert (tmp_path / "stopped").read_text() == "SIGINT"


def test_ctrl_c_again_does_not_wait(parent, tmp_path):
    process = parent("deaf")
    os.killpg(process.pid, signal.SIGINT)
    assert process.stderr.readline() == "one line\n"
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) == 130 and process.stderr.read() == ""


def test_the_child_of_a_parent_that_is_killed_is_asked_to_stop(parent, tmp_path):
    parent().kill()
    wait_for(tmp_path / "stopped")
    assert (tmp_path / "stopped").read_text() == "SIGTERM"


def test_children_started_in_the_block_are_deaf_and_this_process_hears_again():
    script = "import signal; print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)"
    command = [sys.executable, "-c", script]
    before = signal.getsignal(signal.SIGINT)
    with processes.deaf_children(signal.SIGINT):
        inside = subprocess.run(command, capture_output=True, text=True)
    outside = subprocess.run(command, capture_output=True, text=True)
    assert (inside.stdout, outside.stdout) == ("True\n", "False\n")
    assert signal.getsignal(signal.SIGINT) == before
