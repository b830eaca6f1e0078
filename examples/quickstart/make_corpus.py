"""Speak the quickstart corpus: ``corpus/*.jsonl`` -> FLAC files and NeMo manifests.

    python examples/quickstart/make_corpus.py --output runs/quickstart/corpus

Writes ``<output>/<split>/<id>.flac`` (16 kHz, mono, 16 bit) and ``<output>/<split>.jsonl`` with ``audio_filepath``
(absolute), ``duration`` (seconds), ``text`` and ``id`` per line. The same rows give the same bytes. An interrupted run
resumes: a file with its final name is complete, and a manifest is written after all its files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import numpy as np
import soundfile
import soxr

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.quickstart.espeak import Espeak  # noqa: E402
from examples.quickstart.sentences import CORPUS_DIR, SPLIT_SIZES  # noqa: E402
from megatron_most.cli import require_positive, run  # noqa: E402
from megatron_most.errors import DataError  # noqa: E402
from megatron_most.files import replacing, write_text  # noqa: E402
from megatron_most.processes import deaf_children  # noqa: E402
from megatron_most.progress import Progress  # noqa: E402

SAMPLE_RATE = 16000
PEAK = 0.7
SILENCE_THRESHOLD = 0.005
LEAD_SAMPLES, TAIL_SAMPLES = 400, 800  # 25 and 50 ms of silence around the speech, in addition to the row's offset
RENDER_VERSION = 1  # raise it when the same row would give different audio: old files are then synthesized again

_engine: Espeak | None = None  # one per worker process


def render(engine: Espeak, row: dict) -> np.ndarray:
    """Speak one corpus row: float32 ``[num_samples]`` at 16 kHz, peak 0.7, trimmed, shifted by the row's offset.

    ``row`` holds text, speed, pitch and offset, and may name another voice than ``en-us``.
    """
    voice = row.get("voice", "en-us")
    speech = engine.synthesize(row["text"], voice=voice, speed=row["speed"], pitch=row["pitch"])
    speech = soxr.resample(speech, engine.sample_rate, SAMPLE_RATE)
    speech *= PEAK / np.abs(speech).max()
    loud = np.flatnonzero(np.abs(speech) > SILENCE_THRESHOLD)
    return np.pad(speech[loud[0] : loud[-1] + 1], (LEAD_SAMPLES + row["offset"], TAIL_SAMPLES))


def read_rows(split: str) -> list[dict]:
    """The rows of ``corpus/<split>.jsonl``; raises DataError if the file is missing or broken."""
    path = CORPUS_DIR / f"{split}.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read corpus file {path}: {error}") from error


def fingerprint(rows: list[dict]) -> str:
    """A hash of everything that the audio files of a split are made from."""
    return hashlib.sha256(json.dumps([RENDER_VERSION, rows]).encode()).hexdigest()


def _write_audio(job: tuple[dict, Path]) -> None:
    global _engine
    if _engine is None:
        _engine = Espeak()
    row, path = job
    with replacing(path) as temporary:
        soundfile.write(temporary, render(_engine, row), SAMPLE_RATE, format="FLAC", subtype="PCM_16")


def make_split(split: str, output: Path, workers: int, limit: int | None = None) -> Path:
    """Speak one split into ``output`` and write its manifest. Existing files are kept.

    Args:
        limit: the number of sentences, from the first on (splits are in random order).

    Returns:
        The path of the manifest.
    """
    all_rows = read_rows(split)
    rows = all_rows[:limit]
    audio_dir = output / split
    audio_dir.mkdir(parents=True, exist_ok=True)
    source, manifest = audio_dir / "source.sha256", output / f"{split}.jsonl"
    if not source.exists() or source.read_text() != fingerprint(all_rows):
        manifest.unlink(missing_ok=True)
        for stale in audio_dir.glob("*.flac"):
            stale.unlink()
        write_text(source, fingerprint(all_rows))

    paths = [audio_dir / f"{row['id']}.flac" for row in rows]
    jobs = [(row, path) for row, path in zip(rows, paths, strict=True) if not path.exists()]
    if jobs:
        with deaf_children(signal.SIGINT):  # this process stops them
            pool = multiprocessing.get_context("spawn").Pool(workers)
        with (
            pool,
            Progress(split, len(rows), " sentences", initial=len(rows) - len(jobs)) as progress,
        ):
            for _ in pool.imap_unordered(_write_audio, jobs, chunksize=16):
                progress.add(1)

    lines = []
    for row, path in zip(rows, paths, strict=True):
        entry = {"audio_filepath": str(path.resolve()), "duration": soundfile.info(path).duration}
        lines.append(json.dumps(entry | {"text": row["text"], "id": row["id"]}) + "\n")
    write_text(manifest, "".join(lines))
    return manifest


def main(arguments: argparse.Namespace) -> None:
    require_positive(arguments, "workers", "limit")
    Espeak()  # fail here, in one line, and not in every worker
    for split in arguments.splits:
        manifest = make_split(split, arguments.output, arguments.workers, arguments.limit)
        print(f"{split}: {manifest}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="speak the quickstart corpus with espeak-ng")
    parser.add_argument("--output", type=Path, required=True, help="directory for audio and manifests")
    parser.add_argument("--splits", nargs="+", choices=SPLIT_SIZES, default=list(SPLIT_SIZES), help="default: all")
    parser.add_argument("--limit", type=int, help="only the first so many sentences of each split")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    run(parser, main)
