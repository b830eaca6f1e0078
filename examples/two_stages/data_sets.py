"""Small data sets in the layouts in which the field publishes its own, in their exact form.

A sample's sound is whatever ``write`` makes an audio file of: a row of the corpus here, a loudness in the tests.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Write = Callable[[Path, Any], object]
"""Writes the audio file of a sound. Its folder exists."""

ZEROSPEECH = {
    "lexical": ("filename", "id", "voice", "frequency", "word", "phones", "length", "correct"),
    "syntactic": ("filename", "id", "voice", "type", "subtype", "transcription", "correct"),
}
"""Columns of ``gold.csv``: sWUGGY's and sBLIMP's."""

OPEN_AUDIO_BENCH: dict[str, tuple[str, str, Callable[[Sequence[str]], str]]] = {
    "llama_questions": ("Questions", "Answer", lambda answers: answers[0]),
    "web_questions": ("question", "answers", lambda answers: repr(list(answers))),
    "trivia_qa": ("question", "answer_normalized_aliases", json.dumps),
}
"""Set -> columns of question and answers, and how a cell of answers is written."""


@dataclass(frozen=True)
class Spoken:
    """A text that is read aloud; ``answers`` where it is a question."""

    text: str
    sound: Any
    answers: tuple[str, ...] = ()


def zerospeech(root: Path, task: str, split: str, rows: Iterable[tuple[Mapping[str, Any], Any]], write: Write) -> Path:
    """``<task>/<split>`` of ZeroSpeech 2021's sLM21-dataset: opaque names of files, and what they are in ``gold.csv``.

    Args:
        task: one of :data:`ZEROSPEECH`.
        rows: the columns of a recording, and its sound.
    """
    folder, columns = root / task / split, ZEROSPEECH[task]
    table = []
    for row, sound in rows:
        _write(write, folder / f"{row['filename']}.wav", sound)
        table.append({name: row[name] for name in columns})
    write_csv(folder / "gold.csv", table)
    return root


def numbered_stories(folder: Path, pairs: Iterable[tuple[Any, Any]], write: Write) -> Path:
    """SpokenStoryCloze, one file a story: a true story and a false one follow each other."""
    for number, sound in enumerate(sound for pair in pairs for sound in pair):
        _write(write, folder / f"{number}_story.wav", sound)
    return folder


def story_triples(folder: Path, stories: Iterable[Mapping[str, Spoken]], write: Write) -> Path:
    """SpokenStoryCloze in parts, each spoken and written: ``mutual``, ``correct`` and ``incorrect``."""
    for number, parts in enumerate(stories):
        for kind in ("mutual", "correct", "incorrect"):
            _write(write, folder / f"{number}_{kind}.wav", parts[kind].sound)
            (folder / f"{number}_{kind}.txt").write_text(f"{parts[kind].text}\n", encoding="utf-8")
    return folder


def salmon(folder: Path, parts: Mapping[str, Iterable[tuple[Any, Any]]], write: Write) -> Path:
    """SALMon: for each of its eight parts, recordings that are unchanged and changed."""
    for part, pairs in parts.items():
        for number, pair in enumerate(pairs):
            for place, sound in enumerate(pair):
                _write(write, folder / part / f"sample_{number}_{place}.wav", sound)
    return folder


def open_audio_bench(root: Path, name: str, questions: Iterable[Spoken], write: Write) -> Path:
    """``eval_datas/<name>`` with ``<name>.csv`` and ``audios``; ``name`` is one of :data:`OPEN_AUDIO_BENCH`."""
    question, answer, spelled = OPEN_AUDIO_BENCH[name]
    folder, rows = root / "eval_datas" / name, []
    for number, one in enumerate(questions):
        path = folder / "audios" / f"{name}_{number}.wav"
        _write(write, path, one.sound)
        rows.append({question: one.text, answer: spelled(one.answers), "audio_filename": path.name})
    write_csv(folder / f"{name}.csv", rows)
    return folder


def ultra_eval_audio(root: Path, questions: Iterable[Spoken], write: Write, answer: str = "answers") -> Path:
    """A folder with a Parquet file that holds the audio, as ``datasets`` writes it.

    Args:
        answer: the column of answers; ``Answer`` holds the first alone, as in Llama Questions.
    """
    import pyarrow
    import pyarrow.parquet

    rows = []
    for number, one in enumerate(questions):
        path = root / "sounds" / f"{number}.wav"
        _write(write, path, one.sound)
        audio = {"bytes": path.read_bytes(), "path": path.name}
        rows.append(
            {"audio": audio, "question": one.text, answer: one.answers[0] if answer == "Answer" else list(one.answers)}
        )
    (root / "data").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "data" / "test-00000-of-00001.parquet")
    return root / "data"


def manifest(path: Path, texts: Iterable[Spoken], write: Write) -> Path:
    """A NeMo manifest, and its recordings in ``wavs`` beside it."""
    lines = []
    for number, one in enumerate(texts):
        sound = path.parent / "wavs" / f"{number}.wav"
        _write(write, sound, one.sound)
        entry = {"id": str(number), "audio_filepath": f"wavs/{sound.name}", "text": one.text}
        lines.append(json.dumps(entry) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def meta_list(folder: Path, texts: Iterable[tuple[Spoken, str]], write: Write) -> Path:
    """seed-tts-eval's ``meta.lst``: of each utterance a prompt, whose voice to imitate, and the text to speak."""
    lines = []
    for number, (prompt, text) in enumerate(texts):
        sound = folder / "prompt-wavs" / f"utterance_{number}.wav"
        _write(write, sound, prompt.sound)
        lines.append(f"{sound.stem}|{prompt.text}|prompt-wavs/{sound.name}|{text}\n")
    (folder / "meta.lst").write_text("".join(lines), encoding="utf-8")
    return folder / "meta.lst"


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table with a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _write(write: Write, path: Path, sound: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, sound)
