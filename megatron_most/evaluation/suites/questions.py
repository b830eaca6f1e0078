"""Spoken question answering: Llama Questions, TriviaQA and Web Questions, read aloud.

Two layouts:

    OpenAudioBench   <set>/<set>.csv with a column audio_filename, and <set>/audios/
    UltraEval-Audio  Parquet files with a column audio (bytes and path), as Hugging Face's data sets have them

Columns of answers are ``Answer`` (Llama Questions), ``answers`` (Web Questions), and ``answer``, ``answer_aliases`` or
``answer_normalized_aliases`` (TriviaQA). All aliases count.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_most.data.storage.parquet import read_rows
from megatron_most.errors import DataError
from megatron_most.evaluation.answers import aliases, has_answer, is_exact
from megatron_most.evaluation.interface import Model
from megatron_most.evaluation.judge import Judge
from megatron_most.evaluation.recognizers import Recognizer
from megatron_most.evaluation.scores import interval, score, units_of
from megatron_most.evaluation.suites.base import Interval, Outcome
from megatron_most.evaluation.suites.spoken_questions import SpokenQuestionSuite, audio_of
from megatron_most.files import read_text
from megatron_most.inference import Decoding
from megatron_most.parallel import speaks_for_model

QUESTIONS = ("Questions", "question", "Question")
ANSWERS = ("Answer", "answers", "answer", "answer_value", "answer_aliases", "answer_normalized_aliases")


@dataclass(frozen=True)
class Question:
    """audio: a file, or the bytes of one. ``text`` is what is asked, for the reader of results."""

    id: str
    audio: Path | bytes
    text: str
    answers: tuple[str, ...]


class QuestionSuite(SpokenQuestionSuite[Question]):
    """Answers to spoken questions, compared with the right ones.

    Args:
        path: a CSV or Parquet file, or the folder that holds it.
        recognizer: reads spoken answers; None asks for written ones.
        judge: a language model that judges the answers, too.
    """

    name, metric = "sqa", "has_answer"

    def __init__(
        self,
        path: str | Path,
        decoding: Decoding | None = None,
        recognizer: Recognizer | None = None,
        limit: int | None = None,
        judge: Judge | None = None,
    ) -> None:
        super().__init__(decoding, recognizer)
        self.judge = judge
        self._samples = list(read_questions(Path(path)))[:limit]
        self.set_name = f"{Path(path).stem} {'S-T' if recognizer is None else 'S-S'}"

    @property
    def samples(self) -> Sequence[Question]:
        return self._samples

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, **({"judge": self.judge.settings} if self.judge else {})}

    def outcomes(self, model: Model, samples: Sequence[Question]) -> list[Outcome]:
        found = super().outcomes(model, samples)
        if self.judge is None or not speaks_for_model():
            return found
        working = [(sample, one) for sample, one in zip(samples, found, strict=True) if "failed" not in one]
        verdicts = self.judge.judge([(sample.text, sample.answers, one["answer"]) for sample, one in working])
        for (_, one), verdict in zip(working, verdicts, strict=True):
            if isinstance(verdict, DataError):
                one |= {"failed": str(verdict), **dict.fromkeys(("value", "exact_match", "exact_match_of_first"), 0.0)}
            else:
                one["judged_correct"] = float(verdict)
        return found

    def summary(self, outcomes: Sequence[Outcome], score: float, interval: Interval) -> dict[str, Any]:
        judged = [{"judged_correct": 0.0, **outcome} for outcome in outcomes]
        return {
            "num_at_limit": sum(outcome.get("at_limit", False) for outcome in outcomes),
            "exact_match": _scored(outcomes, "exact_match"),
            "exact_match_of_first": _scored(outcomes, "exact_match_of_first"),
            **({"judged_correct": _scored(judged, "judged_correct")} if self.judge else {}),
        }

    def judged(self, samples: Sequence[Question], answers: Sequence[str]) -> list[Outcome]:
        return [_outcome(sample, text) for sample, text in zip(samples, answers, strict=True)]


def _outcome(sample: Question, text: str) -> Outcome:
    return {
        "id": sample.id,
        "value": float(has_answer(sample.answers, text)),
        "exact_match": float(is_exact(sample.answers, text)),
        "exact_match_of_first": float(is_exact(sample.answers[:1], text)),
        "question": sample.text,
        "answers": list(sample.answers),
        "answer": text,
    }


def _scored(outcomes: Sequence[Outcome], key: str) -> dict[str, Any]:
    units = units_of(outcomes, key)
    return {"score": score(units), "interval": interval(units)}


def read_questions(path: Path) -> Iterator[Question]:
    """The questions of a CSV or Parquet file, or of the folder that holds it.

    Raises:
        DataError: there is no such file, or a row has no answer or no audio.
    """
    if path.is_dir():
        named = path / f"{path.name}.csv"
        files = [named] if named.is_file() else sorted(path.rglob("*.parquet"))
        if not files:
            raise DataError(f"{path}: holds neither {named.name} nor Parquet files")
    elif path.is_file():
        files = [path]
    else:
        raise DataError(f"{path}: no such file or folder")
    for file in files:
        rows = _parquet_rows(file) if file.suffix == ".parquet" else _csv_rows(file)
        for number, row in enumerate(rows):
            where = f"{file}, row {number + 1}"
            answers = list(dict.fromkeys(one for name in ANSWERS for one in aliases(row.get(name))))
            if not answers:
                raise DataError(f"{where}: has no answer in {', '.join(ANSWERS)}")
            text = next((str(row[name]) for name in QUESTIONS if row.get(name)), "")
            yield Question(f"{file.stem}/{number}", _audio(file, row, where), text, tuple(answers))


def _audio(file: Path, row: Mapping[str, Any], where: str) -> Path | bytes:
    if name := row.get("audio_filename"):
        return file.parent / "audios" / str(name)
    if (audio := audio_of(file, row.get("audio"))) is not None:
        return audio
    raise DataError(f"{where}: has no audio in audio_filename or audio")


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    try:
        return list(csv.DictReader(io.StringIO(read_text(path, DataError).removeprefix("\ufeff"))))
    except (UnicodeDecodeError, csv.Error):
        raise DataError(f"{path}: not readable as CSV") from None


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(read_rows(path, {*QUESTIONS, *ANSWERS, "audio", "audio_filename"}), start=1):
        if isinstance(row, str):
            raise DataError(f"{path}, row {number}: {row}")
        yield row
