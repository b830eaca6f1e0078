"""Audio -> codec codes, by several processes of one or many machines, in shards that survive an interruption.

While a job runs, ``<output>.parts`` holds the collected manifest and the finished shards, and ``<output>.lock`` tells
the job's tasks of each other. The last task to end puts the output together and removes both.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_most.audio import AudioCodec, codec_file, file_fingerprint, load_codec
from megatron_most.data.preparation.collect import (
    CONTENT,
    MAX_QUARANTINE,
    SIZE_AND_TIME,
    Collected,
    SourceSpec,
    collect,
)
from megatron_most.data.preparation.shards import Execution, Job, Limits, Shard
from megatron_most.data.preparation.shared_folder import hostname_and_pid, one_line_when_the_disk_is_full
from megatron_most.data.preparation.tokenize_merge import merge_shards
from megatron_most.data.preparation.tokenize_workers import encode_all
from megatron_most.data.storage.codes import CodecIdentity, CodesDataset
from megatron_most.data.storage.sidecar import read_sidecar, write_sidecar
from megatron_most.errors import ConfigError, DataError
from megatron_most.locks import locked

SHARD_SIZES = (32, 1024)
"""Fewest and most records of a shard: what an interruption can cost each process."""

NUM_SHARDS = 64
"""How many shards to aim at between these sizes, so that all processes have work to the end."""


def tokenize_audio(
    source: SourceSpec | str | Path,
    codec: str | Path,
    output: str | Path,
    *,
    execution: Execution | None = None,
    limits: Limits | None = None,
    max_quarantine: float = MAX_QUARANTINE,
    command: str = "",
) -> CodesDataset | None:
    """Encode every record of ``source`` with ``codec`` into ``<output>.{codes.bin,codes.idx,jsonl,json}``.

    What cannot be used is listed in ``<output>.quarantine.jsonl`` with its reason. The result does not depend on the
    number of workers or tasks, nor on interruptions: the same job run again takes finished shards as they are, and a
    finished job returns at once.

    Args:
        source: what to read; a path is a NeMo manifest.
        codec: as :func:`~megatron_most.audio.load_codec` takes it.
        max_quarantine: share of the source that may be unusable.
        command: the command line, kept in the sidecar.

    Returns:
        None when other tasks have not done their shards yet; the last of them puts the output together.

    Raises:
        DataError: a source that cannot be read; more of it in quarantine than ``max_quarantine``; a full disk; or an
            output made from another source, with another codec or other limits.
    """
    output, limits, execution = Path(output), limits or Limits(), execution or Execution()
    task = execution.task
    if not isinstance(source, SourceSpec):
        source = SourceSpec("nemo", str(source))
    parts, lock, finished = (Path(f"{output}.{ending}") for ending in ("parts", "lock", "json"))
    if not 0 <= task[0] < task[1]:
        raise ConfigError(f"shard {task[0]}/{task[1]}: must be i/n with i in 0..n-1")
    if not source.open().has_audio:
        raise ConfigError(f"source {source.name}: is text without audio; most prepare build takes its manifest")
    output.parent.mkdir(parents=True, exist_ok=True)
    with one_line_when_the_disk_is_full(output), _tidied(lock, parts):
        with locked(lock, shared=True):  # beside the job's other tasks
            prepared = _prepare(source, codec, output, parts, limits, execution)
            if prepared is not None:
                job, loaded = prepared
                shards = _shards(parts, job.collected.num_records)
                encode_all(shards[task[0] :: task[1]], loaded, job, execution.workers or len(os.sched_getaffinity(0)))
        if prepared is not None and not finished.is_file() and not all(shard.is_done for shard in shards):
            return None
        with locked(lock):  # alone
            if prepared is not None and not finished.is_file():
                merge_shards(shards, job, parts, output, max_quarantine, command)
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
        with locked(lock, wait=False) as alone:
            if alone is not None and not parts.exists():
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
    source: SourceSpec, codec: str | Path, output: Path, parts: Path, limits: Limits, execution: Execution
) -> tuple[Job, AudioCodec] | None:
    """The job and its codec, None when the output is already there; refuses what another job has begun or finished."""
    device = _device(execution.device)
    own = parts / f"collecting.{hostname_and_pid()}"
    records, rejected = own / "records.jsonl", own / "rejected.jsonl"
    try:
        collected = collect(source, records, rejected, hash_audio=execution.hash_audio)
        finished = Path(f"{output}.json")
        if finished.is_file():
            # Loading a codec takes seconds; the fingerprint of a file is enough to see that there is nothing to do.
            file = codec_file(codec)
            fingerprint = file_fingerprint(file) if file else load_codec(codec).fingerprint
            _require_same_job(finished, collected, fingerprint, limits, device)
            return None
        print(f"tokenize: loading the codec {codec}", file=sys.stderr, flush=True)  # NeMo takes seconds to import
        loaded = load_codec(codec)
        job = Job(source, collected, CodecIdentity.of(loaded), limits, device)
        if (parts / "job.json").is_file():
            _require_same_job(parts / "job.json", collected, loaded.fingerprint, limits, device)
        os.replace(records, parts / records.name)
        os.replace(rejected, parts / rejected.name)
        write_sidecar(parts / "job.json", job.to_dict())
        return job, loaded
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _require_same_job(path: Path, collected: Collected, fingerprint: str, limits: Limits, device: str) -> None:
    found = read_sidecar(path, "tokenization")
    codec = found.get("codec") or {}
    advice = "remove it or choose another output"
    if codec.get("fingerprint") != fingerprint:
        raise DataError(f"{path}: was made with another codec, {codec.get('name')}; {advice}")
    if found.get("records_sha256") != collected.sha256:
        root = (found.get("source") or {}).get("root")
        raise DataError(f"{path}: was made from {root} in another state; {advice}")
    # Jobs of version 0.1 say neither of these.
    identity = found.get("audio_identity", SIZE_AND_TIME)
    if identity != collected.audio_identity:
        had = "with" if identity == CONTENT else "without"
        raise DataError(f"{path}: was made {had} --hash-audio; repeat it {had} that option, or {advice}")
    if found.get("audio_sha256", collected.audio_sha256) != collected.audio_sha256:
        other = identity.replace(" and ", " or ")
        raise DataError(f"{path}: audio files were edited since (another {other}); {advice}")
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
