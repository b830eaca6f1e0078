"""A thread makes what comes next: in order, never too far ahead, and its errors come where they belong."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_most import parallel
from megatron_most.errors import DataError
from megatron_most.model.packed_row import PackedRow
from megatron_most.training import microbatches, prefetch
from megatron_most.training.prefetch import Prefetch
from tests.distributed.tiny import tiny_batch, tiny_config


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def wait_until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_order_is_kept_and_work_is_done_ahead_in_another_thread() -> None:
    made: list[tuple[int, str]] = []

    def prepare(item: int) -> int:
        made.append((item, threading.current_thread().name))
        return 10 * item

    with Prefetch(itertools.count(), prepare, depth=3) as items:
        wait_until(lambda: len(made) == 4)  # three wait, and one more is in the hands of the thread
        time.sleep(0.05)
        assert [item for item, _ in made] == [0, 1, 2, 3]
        assert [next(items) for _ in range(20)] == [10 * item for item in range(20)]
    assert {name for _, name in made} == {"prefetch"}
    assert not threads()


def test_an_error_comes_where_its_item_would_have_and_stays() -> None:
    def rows() -> Iterator[int]:
        yield from (1, 2)
        raise DataError("dataset a: row 3 is broken")

    with Prefetch(rows(), lambda item: item, depth=8) as items:
        wait_until(lambda: not threads())
        assert [next(items), next(items)] == [1, 2]
        for _ in range(3):
            with pytest.raises(DataError, match="^dataset a: row 3 is broken$"):
                next(items)


def test_the_end_of_a_finite_stream_is_its_end() -> None:
    with Prefetch(iter("abc"), str.upper, depth=2) as items:
        assert list(items) == ["A", "B", "C"]


def test_an_item_that_does_not_come_ends_the_wait_and_its_thread_is_left_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefetch, "_JOIN_SECONDS", 0.1)
    release = threading.Event()
    with pytest.raises(TimeoutError), Prefetch(iter([1]), lambda item: release.wait(), depth=1, timeout=0.2) as items:
        next(items)
    release.set()
    wait_until(lambda: not threads())


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, DataError])
def test_whatever_ends_the_training_ends_the_thread(error: type[BaseException]) -> None:
    with pytest.raises(error), Prefetch(itertools.count(), lambda item: item, depth=1):
        wait_until(threads)
        raise error
    assert not threads()


def test_a_staged_batch_has_its_packed_row_and_the_step_makes_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(data__packing=True, training__micro_batch_size=1)
    parallel.initialize(config.parallel, seed=1)
    batch = tiny_batch(config, seed=0)
    staged = microbatches.stage(batch, torch.device("cpu"))
    assert isinstance(staged.packed_row, PackedRow)
    for name in ("ids", "loss_mask", "codes", "cu_seqlens"):
        assert torch.equal(getattr(staged, name), getattr(batch, name))

    monkeypatch.setattr(microbatches, "packed_seq_params", lambda batch: pytest.fail("made again"))
    given = {}

    class Stage(torch.nn.Module):
        post_process = True

        def forward(self, *ids: torch.Tensor, **options: Any) -> None:
            given.update(options)

    microbatches.forward_step(print, iter([staged]), Stage())
    assert given["packed_seq_params"] is staged.packed_row
    few = staged.take_positions(torch.tensor([0, 2]))
    assert few.packed_row is staged.packed_row and few.ids.shape == (1, 2)


def test_rows_of_one_document_have_none() -> None:
    config = tiny_config()
    staged = microbatches.stage(tiny_batch(config, seed=0), torch.device("cpu"))
    assert staged.packed_row is None and dataclasses.replace(staged, codes=None).to("cpu").codes is None
