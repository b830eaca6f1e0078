"""A run that no longer moves: who is where, said once, in time; a run that moves: nothing."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from megatron_most.errors import DataError
from megatron_most.training.prefetch import Prefetch
from megatron_most.training.watchdog import WAITING_FOR_DATA, Place, Watchdog

SECONDS = 1.2
HERE = Place("node1", 11, True)
ELSEWHERE = Place("node7", 77, False)


class Ranks:
    """Watchdogs of several ranks in this process, and what they said."""

    def __init__(self, run_dir: Path, places: list[Place]) -> None:
        self.run_dir, self.places, self.said = run_dir, places, []

    def rank(self, rank: int) -> Watchdog:
        timeout = timedelta(seconds=SECONDS)
        return Watchdog(rank, self.places, self.run_dir, timeout, lambda line: self.said.append((rank, line)))

    def wait(self, lines: int = 1) -> None:
        end = time.monotonic() + 10
        while len(self.said) < lines:
            assert time.monotonic() < end, self.said
            time.sleep(0.01)
        time.sleep(SECONDS / 8)  # would there be more?
        assert len(self.said) == lines, self.said


@contextlib.contextmanager
def moving(watchdog: Watchdog) -> Iterator[None]:
    """Enters a phase all the time, from another thread."""
    ended = threading.Event()

    def move() -> None:
        while not ended.wait(0.01):
            watchdog.enter(9, "forward")

    thread = threading.Thread(target=move)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_the_rank_that_differs_is_named_first_by_one_rank_in_one_line_before_the_timeout(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, [HERE] * 4)
    with contextlib.ExitStack() as stack:
        watchdogs = [stack.enter_context(ranks.rank(rank)) for rank in range(4)]
        began = time.monotonic()
        for rank, watchdog in enumerate(watchdogs):
            watchdog.enter(4, "saving" if rank == 2 else "forward")
        ranks.wait()
        assert time.monotonic() - began < SECONDS
    [(speaker, line)] = ranks.said
    assert speaker == 0
    assert line.startswith("warning: no progress for 1 s: rank 2: step 4, saving")
    assert "; ranks 0-1, 3: step 4, forward" in line and line.endswith(f"; stacks: {tmp_path}/stacks")
    for rank in range(4):
        text = (tmp_path / "stacks" / f"rank-{rank}.txt").read_text()
        assert text.startswith(f"rank {rank}, step 4, {'saving' if rank == 2 else 'forward'}")
        assert "process 11 on node1" in text and "Current thread" in text and "in wait" in text


def test_a_rank_that_moves_answers_the_others_too(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, [HERE, ELSEWHERE])
    with ranks.rank(0) as stuck, ranks.rank(1) as other, moving(other):
        stuck.enter(8, "saving")
        ranks.wait()
    assert ranks.said[0][1].startswith("warning: no progress for 1 s: rank 0: step 8, saving")
    assert "; rank 1: step 9, forward" in ranks.said[0][1]


def test_a_rank_that_does_not_answer_is_named_with_its_process(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, [HERE, ELSEWHERE])
    with ranks.rank(0) as watchdog:
        watchdog.enter(4, "forward")
        ranks.wait()
    assert "no progress for 1 s: rank 1 does not answer (process 77 on node7); rank 0: step 4" in ranks.said[0][1]


def test_a_rank_whose_output_is_shown_speaks_if_it_can(tmp_path: Path) -> None:
    """Launchers show the first rank of each node. Here the first of all does not answer."""
    ranks = Ranks(tmp_path, [HERE, ELSEWHERE, HERE])
    with ranks.rank(1) as hidden, ranks.rank(2) as shown:
        hidden.enter(4, "forward")
        shown.enter(4, "forward")
        ranks.wait()
    assert ranks.said[0][0] == 2 and "rank 0 does not answer" in ranks.said[0][1]


def test_a_run_that_moves_has_no_files_and_leaves_no_thread(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, [HERE])
    with ranks.rank(0) as watchdog, moving(watchdog):
        time.sleep(SECONDS)
    assert not ranks.said and not list(tmp_path.iterdir())
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}


def test_a_long_phase_gets_more_time_and_is_reported_before_the_timeout(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, [HERE])
    with ranks.rank(0) as watchdog:
        watchdog.enter(4, "saving", is_long=True)
        time.sleep(0.65 * SECONDS)
        assert not ranks.said
        time.sleep(0.3 * SECONDS)
        assert len(ranks.said) == 1


def test_stacks_can_be_asked_for_and_those_of_an_earlier_start_do_not_count(tmp_path: Path) -> None:
    folder = tmp_path / "stacks"
    folder.mkdir()
    (folder / "request").touch()
    ranks = Ranks(tmp_path, [HERE])
    with ranks.rank(0) as watchdog, moving(watchdog):
        time.sleep(0.2)
        assert not ranks.said
        time.sleep(0.01)
        (folder / "request").touch()
        ranks.wait()
    assert ranks.said[0][1].startswith("warning: asked for stacks: rank 0: step 9, forward")


def test_every_hang_is_reported_once(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, [HERE])
    with ranks.rank(0) as watchdog:
        watchdog.enter(4, "forward")
        ranks.wait(1)
        watchdog.enter(5, "forward")
        ranks.wait(2)
    assert "step 5, forward" in ranks.said[1][1]


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "stacks").write_text("")
    ranks = Ranks(tmp_path, [HERE])
    with ranks.rank(0) as watchdog:
        watchdog.enter(4, "forward")
        ranks.wait()
    assert "warning: rank 0, step 4, forward: no progress for 1 s; its stacks cannot be written" in ranks.said[0][1]


def test_a_loader_that_hangs_is_where_its_thread_is(tmp_path: Path) -> None:
    release = threading.Event()
    ranks = Ranks(tmp_path, [HERE])
    with ranks.rank(0) as watchdog, Prefetch(iter([1]), lambda item: release.wait(), depth=1) as items:
        watchdog.enter(4, WAITING_FOR_DATA)
        ranks.wait()
        release.set()
        assert next(items)
    assert "rank 0: step 4, waiting for data at training/prefetch.py:" in ranks.said[0][1]
    assert "(_work); stacks" in ranks.said[0][1]


def test_a_process_that_lets_no_thread_run_writes_its_stacks_to_standard_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Ranks(tmp_path, [HERE]).rank(0) as watchdog:
        watchdog.enter(4, "forward")
        time.sleep(0.1)
        ctypes.PyDLL(None).usleep(int(0.9 * SECONDS * 1e6))  # keeps the interpreter to itself
    assert "in test_a_process_that_lets_no_thread_run" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("error", "notes"), [(RuntimeError("gloo"), ["rank 3, step 7, forward"]), (DataError("row 3 is broken"), [])]
)
def test_an_error_says_where_it_was_raised(error: Exception, notes: list[str], tmp_path: Path) -> None:
    with pytest.raises(type(error)), Ranks(tmp_path, [HERE] * 4).rank(3) as watchdog:
        watchdog.enter(7, "forward")
        raise error
    assert getattr(error, "__notes__", []) == notes


def test_the_error_that_ends_a_hang_names_the_key_and_the_stacks(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, [HERE])
    with pytest.raises(RuntimeError) as caught, ranks.rank(0) as watchdog:
        watchdog.enter(7, "forward")
        ranks.wait()
        raise RuntimeError("Timed out")
    [note] = caught.value.__notes__
    assert note == (
        "rank 0, step 7, forward; no progress within parallel.distributed_timeout_minutes=0.02;"
        f" stacks of all ranks: {tmp_path}/stacks"
    )


def test_an_error_after_stacks_were_asked_for_is_no_hang(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, [HERE])
    with pytest.raises(RuntimeError) as caught, ranks.rank(0) as watchdog:
        (tmp_path / "stacks").mkdir()
        watchdog.enter(7, "saving", is_long=True)
        (tmp_path / "stacks" / "request").touch()
        ranks.wait()
        raise RuntimeError("gloo")
    assert caught.value.__notes__ == ["rank 0, step 7, saving"]


def test_entering_a_phase_costs_next_to_nothing(tmp_path: Path) -> None:
    with Ranks(tmp_path, [HERE]).rank(0) as watchdog:
        began = time.process_time()
        for step in range(10_000):
            watchdog.enter(step, "forward")
        assert time.process_time() - began < 0.2
