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
    with StopRequest(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_rank_whose_launcher_was_killed_stops() -> None:
    reader, writer = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        if os.fork() == 0:
            stop = StopRequest()
            os.write(writer, b"started " if not stop else b"too early ")
            while not stop:
                time.sleep(0.01)
            os.write(writer, (stop.signal or "").encode())
        else:
            time.sleep(0.5)
        os._exit(0)
    os.close(writer)
    os.waitpid(launcher, 0)
    with os.fdopen(reader) as pipe:
        assert pipe.read() == "started the loss of its launcher"
