"""The processes that encode the shards of a tokenization job."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event

import torch

from megatron_most.audio import AudioCodec
from megatron_most.data.preparation.encode_shard import encode_shard
from megatron_most.data.preparation.shards import Job, Shard
from megatron_most.data.preparation.shared_folder import one_line_when_the_disk_is_full
from megatron_most.data.preparation.sources import Roots
from megatron_most.errors import DataError
from megatron_most.locks import locked
from megatron_most.progress import Progress


@dataclass
class _Worker:
    """What the parent hands to a worker process: the job, the codec and shared counters."""

    codec: AudioCodec
    job: Job
    number: Synchronized
    files: Synchronized
    samples: Synchronized
    rejected: Synchronized
    stop: Event
    roots: Roots

    def report(self, files: int, samples: int, rejected: int) -> None:
        with self.files.get_lock():
            self.files.value += files
            self.samples.value += samples
            self.rejected.value += rejected


_worker: _Worker | None = None  # set once in each worker process


def _start_worker(worker: _Worker) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent asks to stop
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    if worker.job.device == "cuda":
        with worker.number.get_lock():
            device = worker.number.value % torch.cuda.device_count()
            worker.number.value += 1
        worker.codec.to(f"cuda:{device}")
    _worker = worker


def _end_with_parent(parent: int) -> None:
    """Exit when the parent is gone: a killed parent cannot stop its workers, and they would wait forever."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _encode(shard: Shard, wait_for_others: bool) -> bool:
    """Whether the shard is done; False if another task encodes it and ``wait_for_others`` is False."""
    worker = _worker
    assert worker is not None, "_start_worker has run in this process"
    while not worker.stop.is_set():
        with (
            one_line_when_the_disk_is_full(shard.prefix),
            locked(f"{shard.prefix}.lock", wait=False) as lock,
        ):
            if lock is not None and not shard.is_done:
                encode_shard(shard, worker.codec, worker.roots, worker.job.limits, worker.report, worker.stop.is_set)
        if lock is not None or not wait_for_others:
            return lock is not None
        time.sleep(0.2)
    return True


def encode_all(shards: list[Shard], codec: AudioCodec, job: Job, workers: int) -> None:
    todo = [shard for shard in shards if not shard.is_done]
    if not todo:
        return
    total = sum(shard.num_records for shard in shards)
    done = total - sum(shard.num_records for shard in todo)
    # Forking gives every worker the loaded codec; importing NeMo again would take 8 s each. One thread each, also here:
    # a forked process must not inherit a thread pool, and sums must not depend on the number of threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    number, files, samples, rejected = (context.Value("q", 0) for _ in range(4))
    shared = _Worker(codec, job, number, files, samples, rejected, context.Event(), job.source.open().roots)
    executor = ProcessPoolExecutor(min(workers, len(todo)), context, _start_worker, (shared,))
    try:
        waiting = {executor.submit(_encode, shard, False): shard for shard in todo}
        shown, started = 0, time.monotonic()
        with Progress("tokenize", total, " files", initial=done) as progress:
            while waiting:
                finished, _ = wait(waiting, timeout=progress.interval, return_when=FIRST_COMPLETED)
                for future in finished:
                    shard = waiting.pop(future)
                    if not future.result():  # another task encodes it: wait for it when there is nothing else to do
                        waiting[executor.submit(_encode, shard, True)] = shard
                before, shown = shown, shared.files.value
                progress.add(shown - before, _note(shared, codec.sample_rate, time.monotonic() - started))
    except BrokenProcessPool:
        raise DataError("tokenize: a worker process was killed (out of memory?); finished shards are kept") from None
    finally:
        shared.stop.set()
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _note(shared: _Worker, sample_rate: int, elapsed: float) -> str:
    seconds = shared.samples.value / sample_rate
    note = f"{seconds / 3600:.2f} h of audio at {seconds / elapsed:.0f} h/h"
    return f"{note}, {shared.rejected.value} rejected" if shared.rejected.value else note
