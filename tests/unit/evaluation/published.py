"""Tiny data sets in every published layout that a suite reads. What is correct is louder than what is not."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from megatron_most.evaluation.suites.stories import SALMON_PARTS

VOICES = ("A", "B")
CORRECT, INCORRECT = 0.8, 0.2


def write_sound(path: Path, loudness: float, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    length = 900 + 37 * (seed % 7)
    soundfile.write(path, np.random.default_rng(seed).uniform(loudness / 2, loudness, length), 8000)
    return path


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def zerospeech(root: Path, num_pairs: int = 4, split: str = "dev") -> Path:
    """Both tasks of one split. The words have been seen 0, 1, 5 and 100 times, in turn."""
    for task, folder in (("lexical", root / "lexical" / split), ("syntactic", root / "syntactic" / split)):
        rows = []
        for number in range(num_pairs):
            for voice in VOICES:
                for correct in (1, 0):
                    stem = f"{task[0]}{number:03}{voice}{correct}x"
                    write_sound(folder / f"{stem}.wav", CORRECT if correct else INCORRECT, number)
                    row = {"filename": stem, "id": number, "voice": voice}
                    if task == "lexical":
                        seen = (0, 1, 5, 100)[number % 4] if correct else ""
                        row |= {"frequency": seen, "word": "brick", "phones": "B R IH K", "length": 4 + number % 2}
                    else:
                        row |= {"type": f"t{number % 2}", "subtype": "s", "transcription": "the dog, it barks"}
                    rows.append({**row, "correct": correct})
        write_csv(folder / "gold.csv", rows)
    return root


def numbered_stories(folder: Path, num_pairs: int = 4) -> Path:
    for number in range(2 * num_pairs):
        write_sound(folder / f"{number}_story.wav", INCORRECT if number % 2 else CORRECT, number)
    return folder


def story_triples(folder: Path, num_pairs: int = 4) -> Path:
    for number in range(num_pairs):
        for kind, loudness in (("mutual", 0.5), ("correct", CORRECT), ("incorrect", INCORRECT)):
            write_sound(folder / f"{number}_{kind}.wav", loudness, number)
            (folder / f"{number}_{kind}.txt").write_text(f"{kind} text {'abcdefgh'[number % 8]}\n")
    return folder


def salmon(folder: Path, num_pairs: int = 2) -> Path:
    for part in SALMON_PARTS:
        for number in range(num_pairs):
            write_sound(folder / part / f"sample_{number}_0.wav", CORRECT, number)
            write_sound(folder / part / f"sample_{number}_1.wav", INCORRECT, number)
    return folder


def write_manifest(path: Path, texts: list[str]) -> Path:
    """A NeMo manifest with a recording for each text."""
    lines = []
    for number, text in enumerate(texts):
        sound = write_sound(path.parent / "wavs" / f"{number}.wav", 0.1 + 0.1 * (number % 8), number)
        lines.append(json.dumps({"id": str(number), "audio_filepath": f"wavs/{sound.name}", "text": text}) + "\n")
    path.write_text("".join(lines))
    return path


def damage(path: Path) -> None:
    """Cut a file off, as an interrupted download does."""
    path.write_bytes(path.read_bytes()[:60])


QUESTIONS = [
    ("What is the capital of France?", ["Paris", "City of Light"]),
    ("Who wrote Hamlet?", ["William Shakespeare", "Shakespeare"]),
    ("How many legs has a spider?", ["eight"]),
    ("Which river flows through London?", ["the Thames", "Thames"]),
]
COLUMNS = {
    "llama_questions": ("Questions", "Answer", lambda answers: answers[0]),
    "web_questions": ("question", "answers", repr),
    "trivia_qa": ("question", "answer_normalized_aliases", json.dumps),
}
"""Set of OpenAudioBench -> columns of question and answers, and how a cell of answers is written."""


def open_audio_bench(root: Path, name: str) -> Path:
    """``eval_datas/<name>`` with ``<name>.csv`` and ``audios``."""
    question, answer, spell = COLUMNS[name]
    rows = []
    for number, (text, answers) in enumerate(QUESTIONS):
        sound = write_sound(root / "eval_datas" / name / "audios" / f"{name}_{number}.wav", 0.1 + 0.2 * number, number)
        rows.append({question: text, answer: spell(answers), "audio_filename": sound.name})
    write_csv(root / "eval_datas" / name / f"{name}.csv", rows)
    return root / "eval_datas" / name


def ultra_eval_audio(root: Path, answer: str = "answers") -> Path:
    """A folder with a Parquet file, as ``datasets`` writes audio."""
    import pyarrow
    import pyarrow.parquet

    rows = []
    for number, (text, answers) in enumerate(QUESTIONS):
        sound = write_sound(root / "sounds" / f"{number}.wav", 0.1 + 0.2 * number, number)
        audio = {"bytes": sound.read_bytes(), "path": sound.name}
        rows.append({"audio": audio, "question": text, answer: answers[0] if answer == "Answer" else answers})
    (root / "data").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "data" / "test-00000-of-00001.parquet")
    return root / "data"
