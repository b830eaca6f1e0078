"""Signals that end a run politely."""

from __future__ import annotations

import itertools
import os
import signal
import time

import pytest

from megatron_most.cli import STOP_SIGNALS
from megatron_most.training import stop as stop_module
from megatron_most.training.stop import StopRequest


@pytest.fixture
def long_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every signal comes more than two seconds after the one before it."""
    clock = itertools.count(step=2.1)
    monkeypatch.setattr(stop_module.time, "monotonic", lambda: next(clock))


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_remembered_and_handlers_are_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.signal == number.name
    assert signal.getsignal(number) is before


def test_signals_that_end_a_job_or_a_terminal_are_among_them() -> None:
    assert {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1} == set(STOP_SIGNALS)


def test_a_hangup_stays_ignored_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_one_ctrl_c_that_comes_several_times_is_one(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == "SIGINT"
    assert capfd.readouterr().err == "SIGINT: finishing the step, then saving; a further Ctrl-C ends at once\n"


def test_second_interrupt_ends_at_once_but_a_forwarded_sigterm_does_not(long_after: None) -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop
        assert stop.signal == "SIGINT"
    for between in ([], [signal.SIGTERM]):
        with StopRequest(), pytest.raises(KeyboardInterrupt):
            for number in (signal.SIGINT, *between, signal.SIGINT):
                os.kill(os.getpid(), number)


def test_the_first_interrupt_after_a_sigterm_waits_for_the_step_too(long_after: None) -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("under_torchrun", "expected"), [(True, "the loss of its launcher"), (False, "trains on")])
def test_the_death_of_the_parent_stops_a_rank_of_torchrun_only(
    under_torchrun: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if under_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    else:
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    reader, writer = os.pipe()
    parent = os.fork()
    if parent == 0:
        parent = os.getpid()
        if os.fork() == 0:
            stop = StopRequest()
            os.write(writer, b"started, " if not stop else b"too early, ")
            while os.getppid() == parent:
                time.sleep(0.01)
            os.write(writer, (stop.signal or "").encode() if stop else b"trains on")
        else:
            time.sleep(0.5)
        os._exit(0)
    os.close(writer)
    os.waitpid(parent, 0)
    with os.fdopen(reader) as pipe:
        assert pipe.read() == f"started, {expected}"
