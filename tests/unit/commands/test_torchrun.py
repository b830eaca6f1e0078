"""What the launchers start instead of torchrun: its status, signals under nohup, ranks that it left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed.run
from torch.distributed.elastic.multiprocessing.api import SignalException

from megatron_most import cli
from megatron_most.commands import torchrun
from megatron_most.commands.train import STOPPED_FILE

TERMINATED = SignalException("Process 1 got signal: 15", signal.SIGTERM)
RANK = """
import os, pathlib, signal, sys, time
def save(number, frame):
    time.sleep(0.5)
    pathlib.Path(os.environ["MOST_STOPPED_FILE"]).touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (STOPPED_FILE, "PET_SIGNALS_TO_HANDLE", "PET_SHUTDOWN_TIMEOUT", "PET_LOG_DIR"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    handlers = {number: signal.getsignal(number) for number in cli.STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def status_of(monkeypatch: pytest.MonkeyPatch, run: Callable[[], None], *arguments: str) -> object:
    """The exit status when torchrun does what ``run`` does."""
    given = []
    monkeypatch.setattr(torch.distributed.run, "main", lambda args: (given.append(args), run()))
    with pytest.raises(SystemExit) as leaving:
        torchrun.main(list(arguments))
    assert given == [list(arguments)]
    return leaving.value.code


def save_and(error: BaseException | None) -> Callable[[], None]:
    def run() -> None:
        Path(os.environ[STOPPED_FILE]).touch()
        if error is not None:
            raise error

    return run


def fail_with(error: BaseException) -> Callable[[], None]:
    def run() -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("run", "status"),
    [
        (lambda: None, None),
        (save_and(None), 75),
        (save_and(TERMINATED), 75),
        (save_and(RuntimeError("a rank failed after all had saved")), 75),
        (fail_with(TERMINATED), 143),
    ],
    ids=["finished", "stopped by a signal to the ranks", "stopped by torchrun", "failed late", "stopped unsaved"],
)
def test_status(run: Callable[[], None], status: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert status_of(monkeypatch, run, "--standalone", "x.py") == status


def test_a_failure_is_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed.run, "main", lambda args: fail_with(RuntimeError("rank 1: exit code 1"))())
    with pytest.raises(RuntimeError, match="rank 1"):
        torchrun.main([])


@pytest.mark.parametrize("script", ["absent.py", "-m megatron_most.commands.train --config absent.yaml"])
def test_torchruns_folders_are_removed(script: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torchrun itself makes a folder for the output of ranks when it reads its options, and leaves it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    parsed = torch.distributed.run.parse_args
    seen = []

    def read_options() -> None:
        torch.distributed.run.config_from_args(parsed(["--nproc-per-node", "1", "absent.py"]))
        seen.extend(path.name for path in tmp_path.iterdir())

    monkeypatch.setattr(torch.distributed.run, "main", lambda args: read_options())
    with pytest.raises(SystemExit):
        torchrun.main(["--nproc-per-node", "1", *script.split()])
    assert all(name.startswith("most-") for name in seen)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("handled", "expected"),
    [(None, "SIGTERM,SIGINT,SIGUSR1,SIGQUIT"), ("SIGTERM,SIGHUP", "SIGTERM")],
)
def test_a_hangup_stays_ignored_under_nohup(
    handled: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if handled is not None:
        monkeypatch.setenv("PET_SIGNALS_TO_HANDLE", handled)
    assert status_of(monkeypatch, lambda: None) is None
    assert os.environ["PET_SIGNALS_TO_HANDLE"] == expected


def test_ranks_get_every_signal_that_asks_them_to_save_and_time_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert status_of(monkeypatch, lambda: None) is None
    handled = os.environ["PET_SIGNALS_TO_HANDLE"].split(",")
    assert set(handled) == {"SIGQUIT", *(number.name for number in cli.STOP_SIGNALS)}
    assert os.environ["PET_SHUTDOWN_TIMEOUT"] == "600"
    monkeypatch.setenv("PET_SHUTDOWN_TIMEOUT", "60")
    assert status_of(monkeypatch, lambda: None) is None
    assert os.environ["PET_SHUTDOWN_TIMEOUT"] == "60"


def test_the_record_of_an_earlier_run_does_not_hide_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = tmp_path / "stopped"
    record.touch()
    monkeypatch.setenv(STOPPED_FILE, str(record))
    monkeypatch.setattr(torch.distributed.run, "main", lambda args: fail_with(RuntimeError("rank 1: exit code 1"))())
    with pytest.raises(RuntimeError, match="rank 1"):
        torchrun.main([])


def test_ranks_save_although_torchrun_was_signaled_again_and_left_them_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen] = []

    def run() -> None:
        rank = subprocess.Popen(
            [sys.executable, "-c", RANK], start_new_session=True, stdout=subprocess.PIPE, env=os.environ.copy()
        )
        started.append(rank)
        assert rank.stdout is not None and rank.stdout.readline() == b"ready\n"
        raise TERMINATED

    monkeypatch.setenv("PET_SHUTDOWN_TIMEOUT", "20")
    began = time.monotonic()
    assert status_of(monkeypatch, run) == cli.STOPPED
    assert 0.4 < time.monotonic() - began < 15


def test_a_rank_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen] = []

    def run() -> None:
        started.append(subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 60 & wait"], start_new_session=True))
        time.sleep(0.2)
        raise TERMINATED

    monkeypatch.setenv("PET_SHUTDOWN_TIMEOUT", "0.3")
    assert status_of(monkeypatch, run) == 143
    assert started[0].wait(10) == -signal.SIGKILL
