"""Audio -> codec codes, in several processes, in shards that survive an interruption."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path

import torch

from megatron_most import __version__
from megatron_most.audio import AudioCodec, codec_file, file_fingerprint, load_codec
from megatron_most.data.codes import CodecIdentity, CodesDataset
from megatron_most.data.indexed import FORMAT_VERSION, ArrayWriter, read_json, smallest_dtype
from megatron_most.data.manifest import Record, read_manifest, read_waveform
from megatron_most.errors import DataError
from megatron_most.files import write_json, write_text

SHARD_SIZES = (32, 1024)
"""Fewest and most utterances of a shard: what an interruption can cost each process."""

NUM_SHARDS = 64
"""How many shards to aim at between these sizes, so that all processes have work to the end."""


def tokenise(
    manifest: str | Path,
    codec: str | Path,
    output: str | Path,
    *,
    workers: int | None = None,
    command: str = "",
) -> CodesDataset:
    """Encode every utterance of ``manifest`` with ``codec`` into ``<output>.{codes.bin,codes.idx,jsonl,json}``.

    The result does not depend on the number of workers. Finished shards stay in ``<output>.parts`` until everything is
    done; running the same job again takes them as they are, and a finished job returns at once.

    Args:
        codec: as :func:`~megatron_most.audio.load_codec` takes it.
        workers: processes; None takes one per CPU core this process may use.
        command: the command line, kept in the sidecar.

    Raises:
        DataError: a broken manifest or audio file, or an output made from another manifest or codec.
    """
    output, parts = Path(output), Path(f"{output}.parts")
    records = read_manifest(manifest)
    manifest_sha256 = hashlib.sha256(Path(manifest).read_bytes()).hexdigest()
    if Path(f"{output}.json").is_file():
        # Loading a codec takes seconds; the fingerprint of a file is enough to see that there is nothing to do.
        file = codec_file(codec)
        fingerprint = file_fingerprint(file) if file else load_codec(codec).fingerprint
        _require_same_job(f"{output}.json", manifest_sha256, fingerprint)
        shutil.rmtree(parts, ignore_errors=True)
        return CodesDataset(output)
    loaded = load_codec(codec)
    job = {"manifest": str(manifest), "manifest_sha256": manifest_sha256, "codec": CodecIdentity.of(loaded).to_dict()}
    if (parts / "job.json").is_file():
        _require_same_job(parts / "job.json", manifest_sha256, loaded.fingerprint)
    else:
        write_json(parts / "job.json", {"format": FORMAT_VERSION, **job})

    size = min(max(len(records) // NUM_SHARDS, SHARD_SIZES[0]), SHARD_SIZES[1])
    shards = [
        _Shard(parts / f"{start:09d}", tuple(records[start : start + size])) for start in range(0, len(records), size)
    ]
    waiting = [shard for shard in shards if not shard.is_done]
    already_done = len(records) - sum(len(shard.records) for shard in waiting)
    progress = _Progress(len(records), already_done)
    if waiting:
        _encode_all(waiting, loaded, workers or len(os.sched_getaffinity(0)), progress)
    _merge(shards, output, loaded.codebook_size)
    write_json(f"{output}.json", {"format": FORMAT_VERSION, **job, "tool_version": __version__, "command": command})
    shutil.rmtree(parts)
    return CodesDataset(output)


@dataclass(frozen=True)
class _Shard:
    """Consecutive utterances whose codes are committed together."""

    prefix: Path
    records: tuple[Record, ...]

    @property
    def is_done(self) -> bool:
        return Path(f"{self.prefix}.jsonl").is_file()


def _require_same_job(path: str | Path, manifest_sha256: str, fingerprint: str) -> None:
    found = read_json(path, "tokenisation")
    codec = found.get("codec") or {}
    if codec.get("fingerprint") != fingerprint:
        name = codec.get("name")
        raise DataError(f"{path}: was made with another codec, {name}; remove it or choose another output")
    if found.get("manifest_sha256") != manifest_sha256:
        source = found.get("manifest")
        raise DataError(f"{path}: was made from {source} in another state; remove it or choose another output")


@dataclass
class _Worker:
    """What a worker process is born with: the codec, and counters it shares with the parent."""

    codec: AudioCodec
    files: Synchronized
    samples: Synchronized
    stop: Event


_worker: _Worker | None = None  # set once in each worker process


def _start_worker(worker: _Worker) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent asks to stop
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    _worker = worker


def _end_with_parent(parent: int) -> None:
    """A parent that was killed cannot stop its workers, and they would wait for its next shard for ever."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _encode_shard(shard: _Shard) -> None:
    """Encode and commit one shard; leaves nothing when asked to stop."""
    codec = _worker.codec
    writer = ArrayWriter(f"{shard.prefix}.codes", smallest_dtype(codec.codebook_size))
    lines = []
    try:
        for record in shard.records:
            if _worker.stop.is_set():
                return
            waveform = read_waveform(record, codec.sample_rate)
            codes = codec.encode(waveform)
            writer.add(codes.T.reshape(-1))
            lines.append({"id": record.id, "text": record.text, "num_frames": codes.shape[1]})
            with _worker.files.get_lock():
                _worker.files.value += 1
                _worker.samples.value += len(waveform)
        writer.commit()
    finally:
        writer.discard()
    write_text(f"{shard.prefix}.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _encode_all(shards: list[_Shard], codec: AudioCodec, workers: int, progress: _Progress) -> None:
    # Forking hands every worker the loaded codec; importing NeMo anew would cost each 8 s. One thread each, also here:
    # a forked process must not inherit a thread pool, and sums must not depend on the number of threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    shared = _Worker(codec, context.Value("q", 0), context.Value("q", 0), context.Event())
    executor = ProcessPoolExecutor(min(workers, len(shards)), context, _start_worker, (shared,))
    try:
        waiting = {executor.submit(_encode_shard, shard) for shard in shards}
        while waiting:
            finished, waiting = wait(waiting, timeout=progress.interval, return_when=FIRST_COMPLETED)
            for future in finished:
                future.result()
            progress.show(shared.files.value, shared.samples.value / codec.sample_rate, last=not waiting)
    except BrokenProcessPool:
        raise DataError("tokenise: a worker process was killed (out of memory?); finished shards are kept") from None
    finally:
        shared.stop.set()
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _merge(shards: list[_Shard], output: Path, codebook_size: int) -> None:
    writer = ArrayWriter(f"{output}.codes", smallest_dtype(codebook_size))
    temporary = Path(f"{output}.jsonl.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as merged:
            for shard in shards:
                writer.add_all(f"{shard.prefix}.codes")
                merged.write(Path(f"{shard.prefix}.jsonl").read_bytes())
        writer.commit()
        os.replace(temporary, f"{output}.jsonl")
    finally:
        writer.discard()
        temporary.unlink(missing_ok=True)


class _Progress:
    """One line with files, hours and time left: rewritten every second on a terminal, printed every 5 s elsewhere."""

    def __init__(self, total: int, already_done: int) -> None:
        self._total, self._already_done = total, already_done
        self._terminal = sys.stderr.isatty()
        self.interval = 1.0 if self._terminal else 5.0
        self._started = self._shown = time.monotonic()

    def show(self, files: int, seconds: float, *, last: bool = False) -> None:
        """``files`` and ``seconds`` of audio were encoded since the start; says so when it is time to."""
        now = time.monotonic()
        if now - self._shown < self.interval and not last:
            return
        self._shown, elapsed = now, now - self._started
        done = self._already_done + files
        line = f"tokenise: {done}/{self._total} files, {seconds / 3600:.2f} h of audio at {seconds / elapsed:.0f}x"
        if files and not last:
            line += f", {(self._total - done) * elapsed / files:.0f} s left"
        if self._terminal:
            print(f"\r\x1b[K{line}", end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
