"""Signals that end a run politely."""

from __future__ import annotations

import os
import signal
import time

import pytest

from megatron_most.training.stop import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_remembered_and_handlers_are_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.signal == number.name
    assert signal.getsignal(number) is before


def test_second_interrupt_ends_at_once_but_a_forwarded_sigterm_does_not() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop
        assert stop.signal == "SIGINT"
    for between in ([], [signal.SIGTERM]):
        with StopRequest(), pytest.raises(KeyboardInterrupt):
            for number in (signal.SIGINT, *between, signal.SIGINT):
                os.kill(os.getpid(), number)


def test_the_first_interrupt_after_a_sigterm_waits_for_the_step_too() -> None:
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
