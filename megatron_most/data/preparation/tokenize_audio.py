"""Audio -> codec codes, by several processes of one or many machines, in shards that survive an interruption.

While a job runs, ``<output>.parts`` holds the collected manifest and the finished shards, and ``<output>.lock`` tells
the job's tasks of each other. The last task to end puts the output together and removes both.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path

import torch

from megatron_most import __version__
from megatron_most.audio import AudioCodec, codec_file, file_fingerprint, load_codec
from megatron_most.data.preparation.collect import Collected, SourceSpec, collect
from megatron_most.data.preparation.shards import Limits, Shard, encode_shard, hostname_and_pid, locked
from megatron_most.data.preparation.sources import Roots
from megatron_most.data.preparation.tokenize_progress import Progress
from megatron_most.data.storage.codes import CodecIdentity, CodesDataset
from megatron_most.data.storage.indexed import FORMAT_VERSION, ArrayWriter, read_json, smallest_dtype
from megatron_most.data.storage.json_lines import read_lines
from megatron_most.errors import ConfigError, DataError
from megatron_most.files import write_json

SHARD_SIZES = (32, 1024)
"""Fewest and most records of a shard: what an interruption can cost each process."""

NUM_SHARDS = 64
"""How many shards to aim at between these sizes, so that all processes have work to the end."""

MAX_QUARANTINE = 0.01
"""Share of a source that may be unusable before that is an error."""


@dataclass(frozen=True)
class _Job:
    """Everything that decides what comes out."""

    source: SourceSpec
    collected: Collected
    codec: CodecIdentity
    limits: Limits
    device: str

    def to_dict(self) -> dict:
        return {
            "source": self.source.to_dict() | {"licences": self.collected.licences},
            "records_sha256": self.collected.sha256,
            "codec": self.codec.to_dict(),
            "limits": asdict(self.limits),
            "device": self.device,
        }


def tokenize_audio(
    source: SourceSpec | str | Path,
    codec: str | Path,
    output: str | Path,
    *,
    workers: int | None = None,
    task: tuple[int, int] = (0, 1),
    limits: Limits | None = None,
    max_quarantine: float = MAX_QUARANTINE,
    device: str = "auto",
    command: str = "",
) -> CodesDataset | None:
    """Encode every record of ``source`` with ``codec`` into ``<output>.{codes.bin,codes.idx,jsonl,json}``.

    What cannot be used is listed in ``<output>.quarantine.jsonl`` with its reason. The result does not depend on the
    number of workers or tasks, nor on interruptions: the same job run again takes finished shards as they are, and a
    finished job returns at once.

    Args:
        source: what to read; a path is a NeMo manifest.
        codec: as :func:`~megatron_most.audio.load_codec` takes it.
        workers: processes; None takes one per CPU core this process may use.
        task: (i, n): do only every n-th shard from the i-th on, beside other tasks that do the others.
        device: ``cpu``, ``cuda``, or ``auto``: CUDA where there is one.
        command: the command line, kept in the sidecar.

    Returns:
        None when other tasks have not done their shards yet; the last of them puts the output together.

    Raises:
        DataError: a source that cannot be read; more of it in quarantine than ``max_quarantine``; a full disk; or an
            output made from another source, with another codec or other limits.
    """
    output, limits = Path(output), limits or Limits()
    if not isinstance(source, SourceSpec):
        source = SourceSpec("nemo", str(source))
    parts, lock, finished = (Path(f"{output}.{ending}") for ending in ("parts", "lock", "json"))
    if not 0 <= task[0] < task[1]:
        raise ConfigError(f"shard {task[0]}/{task[1]}: must be i/n with i in 0..n-1")
    if not source.open().has_audio:
        raise ConfigError(f"source {source.name}: is text without audio; prepare_data.py build takes its manifest")
    output.parent.mkdir(parents=True, exist_ok=True)
    with _one_line_when_the_disk_is_full(output), _tidied(lock, parts):
        with locked(lock, shared=True):  # beside the job's other tasks
            job, loaded = _prepare(source, codec, output, parts, limits, _device(device))
            if loaded is not None:
                shards = _shards(parts, job.collected.num_records)
                mine = shards[task[0] :: task[1]]
                _encode_all(mine, loaded, job, workers or len(os.sched_getaffinity(0)))
        if not finished.is_file() and not all(shard.is_done for shard in shards):
            return None
        with locked(lock):  # alone
            if not finished.is_file():
                _merge(shards, job, parts, output, max_quarantine, command)
            shutil.rmtree(parts, ignore_errors=True)
    return CodesDataset(output)


@contextlib.contextmanager
def _tidied(lock: Path, parts: Path) -> Iterator[None]:
    """Afterwards, leave no empty folder, and no lock of a job that is finished or was never begun."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            parts.rmdir()  # only if it is empty
        with locked(lock, wait=False) as is_last:
            if is_last and not parts.exists():
                lock.unlink(missing_ok=True)


def _device(name: str) -> str:
    # Counting devices asks the driver's library; anything more would start CUDA here, and workers are forked from here.
    num_devices = torch.cuda.device_count()
    if name == "auto":
        return "cuda" if num_devices else "cpu"
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"device {name}: must be auto, cpu or cuda")
    if name == "cuda" and not num_devices:
        raise ConfigError("device cuda: this machine has none")
    return name


def _prepare(
    source: SourceSpec, codec: str | Path, output: Path, parts: Path, limits: Limits, device: str
) -> tuple[_Job, AudioCodec | None]:
    """The job, and the codec unless the output is already there; refuses what another job has begun or finished."""
    own = parts / f"collecting.{hostname_and_pid()}"
    records, rejected = own / "records.jsonl", own / "rejected.jsonl"
    try:
        collected = collect(source, records, rejected)
        finished = Path(f"{output}.json")
        if finished.is_file():
            # Loading a codec takes seconds; the fingerprint of a file is enough to see that there is nothing to do.
            file = codec_file(codec)
            fingerprint = file_fingerprint(file) if file else load_codec(codec).fingerprint
            _require_same_job(finished, collected, fingerprint, limits, device)
            return None, None
        loaded = load_codec(codec)
        job = _Job(source, collected, CodecIdentity.of(loaded), limits, device)
        if (parts / "job.json").is_file():
            _require_same_job(parts / "job.json", collected, loaded.fingerprint, limits, device)
        os.replace(records, parts / records.name)
        os.replace(rejected, parts / rejected.name)
        write_json(parts / "job.json", {"format": FORMAT_VERSION, **job.to_dict()})
        return job, loaded
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _require_same_job(path: Path, collected: Collected, fingerprint: str, limits: Limits, device: str) -> None:
    found = read_json(path, "tokenization")
    codec = found.get("codec") or {}
    advice = "remove it or choose another output"
    if codec.get("fingerprint") != fingerprint:
        raise DataError(f"{path}: was made with another codec, {codec.get('name')}; {advice}")
    if found.get("records_sha256") != collected.sha256:
        root = (found.get("source") or {}).get("root")
        raise DataError(f"{path}: was made from {root} in another state; {advice}")
    for name, value in (("limits", asdict(limits)), ("device", device)):
        if found.get(name) != value:
            raise DataError(f"{path}: was made with {name} {found.get(name)}, not {value}; {advice}")


def _shards(parts: Path, num_records: int) -> list[Shard]:
    size = min(max(num_records // NUM_SHARDS, SHARD_SIZES[0]), SHARD_SIZES[1])
    manifest = parts / "records.jsonl"
    starts = [0]
    with open(manifest, "rb") as file:
        for number, _ in enumerate(iter(file.readline, b""), start=1):
            if number % size == 0 or number == num_records:
                starts.append(file.tell())
    counts = [size] * (num_records // size) + [num_records % size] * bool(num_records % size)
    return [
        Shard(parts / f"{index * size:09d}", manifest, starts[index], starts[index + 1], count)
        for index, count in enumerate(counts)
    ]


@dataclass
class _Worker:
    """What a worker process is born with: the codec, and counters it shares with the parent."""

    codec: AudioCodec
    job: _Job
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
    """A parent that was killed cannot stop its workers, and they would wait for its next shard for ever."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _encode(shard: Shard, wait_for_others: bool) -> bool:
    """Whether the shard is done; False when another task is at it and we do not wait."""
    worker = _worker
    while not worker.stop.is_set():
        with (
            _one_line_when_the_disk_is_full(shard.prefix),
            locked(f"{shard.prefix}.lock", wait=False) as is_ours,
        ):
            if is_ours and not shard.is_done:
                encode_shard(shard, worker.codec, worker.roots, worker.job.limits, worker.report, worker.stop.is_set)
        if is_ours or not wait_for_others:
            return is_ours
        time.sleep(0.2)
    return True


def _encode_all(shards: list[Shard], codec: AudioCodec, job: _Job, workers: int) -> None:
    todo = [shard for shard in shards if not shard.is_done]
    total = sum(shard.num_records for shard in shards)
    progress = Progress(total, total - sum(shard.num_records for shard in todo))
    if not todo:
        return
    # Forking hands every worker the loaded codec; importing NeMo anew would cost each 8 s. One thread each, also here:
    # a forked process must not inherit a thread pool, and sums must not depend on the number of threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    counters = [context.Value("q", 0) for _ in range(4)]
    shared = _Worker(codec, job, *counters, context.Event(), job.source.open().roots)
    executor = ProcessPoolExecutor(min(workers, len(todo)), context, _start_worker, (shared,))
    try:
        waiting = {executor.submit(_encode, shard, False): shard for shard in todo}
        while waiting:
            finished, _ = wait(waiting, timeout=progress.interval, return_when=FIRST_COMPLETED)
            for future in finished:
                shard = waiting.pop(future)
                if not future.result():  # another task is at it: come back when there is nothing else to do
                    waiting[executor.submit(_encode, shard, True)] = shard
            seconds = shared.samples.value / codec.sample_rate
            progress.show(shared.files.value, seconds, shared.rejected.value, last=not waiting)
    except BrokenProcessPool:
        raise DataError("tokenize: a worker process was killed (out of memory?); finished shards are kept") from None
    finally:
        shared.stop.set()
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _merge(shards: list[Shard], job: _Job, parts: Path, output: Path, max_quarantine: float, command: str) -> None:
    """Put the shards together under temporary names, check the counts, and give the files their own."""
    merged = parts / "merged"
    shutil.rmtree(merged, ignore_errors=True)  # of a merge that was cut short
    merged.mkdir()
    num_rejected = _merge_quarantine(shards, parts, merged / "quarantine.jsonl")
    total = job.collected.num_records + job.collected.num_rejected
    if num_rejected > max_quarantine * total:
        os.replace(merged / "quarantine.jsonl", f"{output}.quarantine.jsonl")
        if not shards:  # nothing was encoded that the next try, maybe with other folders, could use
            shutil.rmtree(parts)
        raise DataError(
            f"{output}.quarantine.jsonl: {num_rejected} of {total} records are in quarantine, more than"
            f" {max_quarantine:.2%} (--max-quarantine); the first: {_first(f'{output}.quarantine.jsonl')}"
        )
    counts = Counter(records=total, tokenized=0, quarantined=num_rejected, chunked=0, utterances=0, frames=0)
    num_codebooks, dtype = job.codec.num_codebooks, smallest_dtype(job.codec.codebook_size)
    writer = ArrayWriter(str(merged / "codes"), dtype)
    try:
        with open(merged / "jsonl", "w", encoding="utf-8") as lines:
            for shard in shards:
                for line, codes in shard.utterances(num_codebooks, dtype):
                    number, pieces = json.loads(line).get("chunk", (0, 1))
                    counts["tokenized"] += number == 0
                    counts["chunked"] += number == 0 and pieces > 1
                    counts["utterances"] += 1
                    counts["frames"] += len(codes) // num_codebooks
                    writer.add(codes)
                    lines.write(line)
        writer.commit()
    finally:
        writer.discard()
    if not counts["utterances"]:
        raise DataError(
            f"{output}: all of {total} records are in quarantine; the first: {_first(merged / 'quarantine.jsonl')}"
        )
    if counts["tokenized"] + counts["quarantined"] != counts["records"]:
        raise DataError(f"{parts}: {dict(counts)} do not add up; remove it and run again")
    for ending in ("bin", "idx"):
        os.replace(merged / f"codes.{ending}", f"{output}.codes.{ending}")
    for ending in ("jsonl", "quarantine.jsonl"):
        os.replace(merged / ending, f"{output}.{ending}")
    sidecar = {**job.to_dict(), "counts": dict(counts), "tool_version": __version__, "command": command}
    write_json(merged / "json", {"format": FORMAT_VERSION, **sidecar})
    os.replace(merged / "json", f"{output}.json")


def _merge_quarantine(shards: list[Shard], parts: Path, path: Path) -> int:
    count = 0
    with open(path, "w", encoding="utf-8") as file:
        file.write((parts / "rejected.jsonl").read_text(encoding="utf-8"))
        for shard in shards:
            file.writelines(shard.rejected())
    with open(path, "rb") as file:
        count = sum(1 for _ in file)
    return count


def _first(quarantine: str | Path) -> str:
    first = json.loads(next(read_lines(quarantine)).text)
    return f"{first['where']}: {first['reason']}"


@contextlib.contextmanager
def _one_line_when_the_disk_is_full(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}; finished shards are kept") from None
