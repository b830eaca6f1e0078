"""The shards of a finished tokenization job -> its output."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path

from megatron_most import __version__
from megatron_most.data.preparation.shards import Job, Shard
from megatron_most.data.storage.indexed import ArrayWriter, smallest_dtype
from megatron_most.data.storage.json_lines import read_lines
from megatron_most.data.storage.sidecar import write_sidecar
from megatron_most.errors import DataError


def merge_shards(shards: list[Shard], job: Job, parts: Path, output: Path, max_quarantine: float, command: str) -> None:
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
    write_sidecar(merged / "json", sidecar)
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
