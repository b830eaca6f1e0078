"""Tiny data sets in every published layout that a suite reads. What is correct is louder than what is not.

The layouts themselves are those of ``examples/two_stages/data_sets.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from examples.two_stages import data_sets
from examples.two_stages.data_sets import Spoken, write_csv
from megatron_most.evaluation.suites.stories import SALMON_PARTS

__all__ = ["write_csv"]

VOICES = ("A", "B")
CORRECT, INCORRECT = 0.8, 0.2

Sound = tuple[float, int]
"""Loudness, and a seed that decides about the rest."""


def write_sound(path: Path, loudness: float, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    length = 900 + 37 * (seed % 7)
    soundfile.write(path, np.random.default_rng(seed).uniform(loudness / 2, loudness, length), 8000)
    return path


def _write(path: Path, sound: Sound) -> Path:
    return write_sound(path, *sound)


def zerospeech(root: Path, num_pairs: int = 4, split: str = "dev") -> Path:
    """Both tasks of one split. The words have been seen 0, 1, 5 and 100 times, in turn."""
    for task in data_sets.ZEROSPEECH:
        data_sets.zerospeech(root, task, split, _zerospeech_rows(task, num_pairs), _write)
    return root


def _zerospeech_rows(task: str, num_pairs: int) -> Iterator[tuple[dict[str, Any], Sound]]:
    for number in range(num_pairs):
        for voice in VOICES:
            for correct in (1, 0):
                row = {"filename": f"{task[0]}{number:03}{voice}{correct}x", "id": number, "voice": voice}
                if task == "lexical":
                    seen = (0, 1, 5, 100)[number % 4] if correct else ""
                    row |= {"frequency": seen, "word": "brick", "phones": "B R IH K", "length": 4 + number % 2}
                else:
                    row |= {"type": f"t{number % 2}", "subtype": "s", "transcription": "the dog, it barks"}
                yield {**row, "correct": correct}, (CORRECT if correct else INCORRECT, number)


def numbered_stories(folder: Path, num_pairs: int = 4) -> Path:
    pairs = [((CORRECT, 2 * number), (INCORRECT, 2 * number + 1)) for number in range(num_pairs)]
    return data_sets.numbered_stories(folder, pairs, _write)


def story_triples(folder: Path, num_pairs: int = 4) -> Path:
    loudness = {"mutual": 0.5, "correct": CORRECT, "incorrect": INCORRECT}
    stories = [
        {kind: Spoken(f"{kind} text {'abcdefgh'[number % 8]}", (loud, number)) for kind, loud in loudness.items()}
        for number in range(num_pairs)
    ]
    return data_sets.story_triples(folder, stories, _write)


def salmon(folder: Path, num_pairs: int = 2) -> Path:
    pairs = [((CORRECT, number), (INCORRECT, number)) for number in range(num_pairs)]
    return data_sets.salmon(folder, dict.fromkeys(SALMON_PARTS, pairs), _write)


def write_manifest(path: Path, texts: list[str]) -> Path:
    """A NeMo manifest with a recording for each text."""
    spoken = [Spoken(text, (0.1 + 0.1 * (number % 8), number)) for number, text in enumerate(texts)]
    return data_sets.manifest(path, spoken, _write)


def damage(path: Path) -> None:
    """Cut a file off, as an interrupted download does."""
    path.write_bytes(path.read_bytes()[:60])


QUESTIONS = [
    ("What is the capital of France?", ("Paris", "City of Light")),
    ("Who wrote Hamlet?", ("William Shakespeare", "Shakespeare")),
    ("How many legs has a spider?", ("eight",)),
    ("Which river flows through London?", ("the Thames", "Thames")),
]
COLUMNS = data_sets.OPEN_AUDIO_BENCH


def _questions() -> list[Spoken]:
    return [Spoken(text, (0.1 + 0.2 * number, number), answers) for number, (text, answers) in enumerate(QUESTIONS)]


def open_audio_bench(root: Path, name: str) -> Path:
    """``eval_datas/<name>`` with ``<name>.csv`` and ``audios``."""
    return data_sets.open_audio_bench(root, name, _questions(), _write)


def ultra_eval_audio(root: Path, answer: str = "answers") -> Path:
    """A folder with a Parquet file, as ``datasets`` writes audio."""
    return data_sets.ultra_eval_audio(root, _questions(), _write, answer)


def meta_list(folder: Path) -> Path:
    """seed-tts-eval's ``meta.lst``, and the prompts that it names."""
    texts = [(Spoken("A prompt.", (0.5, number)), text) for number, (text, _) in enumerate(QUESTIONS)]
    return data_sets.meta_list(folder, texts, _write)
