"""VoiceBench: spoken requests to an assistant (Chen et al. 2024, arXiv 2410.17196).

The data set is ``<subset>/<split>-*.parquet`` with the columns ``audio`` and ``prompt``, and others that VoiceBench's
evaluators read. Nothing is scored here but whether there is an answer. ``<output>.voicebench.jsonl`` has what the
``main.py`` of VoiceBench writes: the columns of each row but ``audio``, and ``response``. Its ``api_judge.py`` and
``evaluate.py`` take it from there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_most.data.storage.parquet import read_rows
from megatron_most.errors import DataError, first_line
from megatron_most.evaluation.recognizers import Recognizer
from megatron_most.evaluation.suites.base import Interval, Outcome
from megatron_most.evaluation.suites.spoken_questions import SpokenQuestionSuite, audio_of
from megatron_most.files import replacing
from megatron_most.inference import Decoding

SPLIT = "test"


@dataclass(frozen=True)
class Request:
    """A spoken request; ``columns`` are those of its row but ``audio``."""

    id: str
    audio: Path | bytes
    columns: dict[str, Any]


class VoiceBenchSuite(SpokenQuestionSuite[Request]):
    """Answers to spoken requests, for VoiceBench's own evaluators.

    Args:
        path: the folder of a subset, or a Parquet file of it.
        split: of the files in the folder; ``sd-qa`` has one for each region.
        recognizer: reads spoken answers; None asks for written ones.
    """

    name, metric = "voicebench", "answered"

    def __init__(
        self,
        path: str | Path,
        split: str = SPLIT,
        decoding: Decoding | None = None,
        recognizer: Recognizer | None = None,
        limit: int | None = None,
    ) -> None:
        super().__init__(decoding, recognizer)
        self._samples = list(read_requests(Path(path), split))[:limit]
        self.set_name = f"{Path(path).stem} {split} {'S-T' if recognizer is None else 'S-S'}"

    @property
    def samples(self) -> Sequence[Request]:
        return self._samples

    def judged(self, samples: Sequence[Request], answers: Sequence[str]) -> list[Outcome]:
        return [
            {"id": sample.id, "value": 1.0, "prompt": sample.columns["prompt"], "answer": text}
            for sample, text in zip(samples, answers, strict=True)
        ]

    def failure(self, sample: Request, reason: str) -> Outcome:
        return {**super().failure(sample, reason), "value": 0.0}

    def summary(self, outcomes: Sequence[Outcome], score: float, interval: Interval) -> dict[str, Any]:
        return {
            "num_at_limit": sum(outcome.get("at_limit", False) for outcome in outcomes),
            "scored_by": "nobody yet: the score is the share of requests with an answer; run VoiceBench's evaluate.py",
        }

    def write_files(self, outcomes: Sequence[Outcome], output: Path) -> list[Path]:
        """A request that failed has an empty response there."""
        path = output.with_suffix(".voicebench.jsonl")
        lines = [
            json.dumps({**sample.columns, "response": outcome["answer"]}) + "\n"
            for sample, outcome in zip(self._samples, outcomes, strict=True)
        ]
        with replacing(path) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
        return [path]


def read_requests(path: Path, split: str = SPLIT) -> Iterator[Request]:
    """The requests of a subset.

    Raises:
        DataError: there is no such file or split, or a row has no prompt or no audio.
    """
    if path.is_dir():
        files = sorted(path.glob(f"{split}-*.parquet"))
        if not files:
            found = sorted({file.name.rpartition(".")[0].partition("-")[0] for file in path.glob("*.parquet")})
            raise DataError(f"{path}: holds no {split}-*.parquet; splits there: {', '.join(found) or 'none'}")
    elif path.is_file():
        files = [path]
    else:
        raise DataError(f"{path}: no such file or folder")
    for file in files:
        for number, row in enumerate(read_rows(file)):
            yield _request(file, number, row)


def _request(file: Path, number: int, row: dict[str, Any] | str) -> Request:
    where = f"{file}, row {number + 1}"
    if isinstance(row, str):
        raise DataError(f"{where}: {row}")
    audio, columns = audio_of(file, row.get("audio")), {name: value for name, value in row.items() if name != "audio"}
    if audio is None or not isinstance(columns.get("prompt"), str):
        raise DataError(f"{where}: needs audio and a prompt (the conversations of mtbench are not read)")
    if "response" in columns:
        raise DataError(f"{where}: has a response already")
    try:
        json.dumps(columns)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: cannot be written as JSON: {first_line(error)}") from None
    return Request(f"{file.stem}/{number}", audio, columns)
