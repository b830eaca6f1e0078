"""sWUGGY and sBLIMP in the layout of the ZeroSpeech Challenge 2021 (sLM21; arXiv 2011.11588).

    lexical/{dev,test}/gold.csv    filename, id, voice, frequency, word, phones, length, correct
    syntactic/{dev,test}/gold.csv  filename, id, voice, type, subtype, transcription, correct
    beside gold.csv                <filename>.wav

Each word (sentence) and its counterpart have one id, and are read by several voices. A pair's score is a mean over
voices, and the score of the set a mean over pairs. ``gold.csv`` must pair every row: the official scorer joins what it
finds and drops the rest.
"""

from __future__ import annotations

import csv
import io
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_most.errors import ConfigError, DataError
from megatron_most.evaluation.suites.base import Outcome
from megatron_most.evaluation.suites.pairs import HEADLINE, Pair, PairSuite
from megatron_most.files import read_text, write_text

SPLITS = ("dev", "test")
GOLD = "gold.csv"
BANDS = ((1, "oov"), (5, "1-5"), (20, "6-20"), (100, "21-100"))
"""Exclusive upper bounds of occurrences in LibriSpeech, and the official names of the bands; above them is ``>100``."""
_WRONG = (-1e9, 0.0)
"""Scores that a submission gives to a correct word, and its counterpart, that could not be judged."""


class ZeroSpeechSuite(PairSuite):
    """Pairs of one split.

    Args:
        root: the folder that holds ``lexical`` and ``syntactic``.
    """

    folder: str
    """Of the task, in the data set and in submissions."""
    columns: tuple[str, ...]

    def __init__(self, root: str | Path, split: str = "dev", limit: int | None = None) -> None:
        if split not in SPLITS:
            raise ConfigError(f"--split={split}: must be one of {', '.join(SPLITS)}")
        self.split, self.path = split, Path(root) / self.folder / split
        super().__init__(f"{self.folder}/{split}", limit)

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "split": self.split}

    @abstractmethod
    def question(self, row: dict[str, str]) -> tuple[str, dict[str, str]]:
        """The unit of a row, and its groups."""

    def read(self) -> list[Pair]:
        gold = self.path / GOLD
        found: dict[tuple[str, str], dict[str, list[dict[str, str]]]] = {}
        for number, row in enumerate(_rows(gold, ("filename", "id", "voice", "correct", *self.columns)), start=2):
            if row["correct"] not in ("0", "1"):
                raise DataError(f"{gold}, line {number}: correct={row['correct']!r}: must be 0 or 1")
            sides = found.setdefault((self.question(row)[0], row["voice"]), {"1": [], "0": []})
            sides[row["correct"]].append(row)
        pairs = []
        for (unit, voice), sides in found.items():
            if any(len(rows) != 1 for rows in sides.values()):
                counts = f"{len(sides['1'])} correct and {len(sides['0'])} incorrect rows"
                raise DataError(f"{gold}: id {unit}, voice {voice}: has {counts}, must have one of each")
            [positive], [negative] = sides["1"], sides["0"]
            groups = {**self.question(positive)[1], "voice": voice}
            pairs.append(Pair(f"{unit} {voice}", unit, self._wav(positive), self._wav(negative), groups=groups))
        return pairs

    def write_files(self, outcomes: Sequence[Outcome], output: Path) -> list[Path]:
        """``<output>.submission/<folder>/<split>.txt`` with a line ``<stem> <score>`` for every file."""
        by_id = {outcome["id"]: outcome for outcome in outcomes}
        lines = []
        for pair in self.samples:
            outcome = by_id[pair.id]
            scores = _WRONG
            if "failed" not in outcome:
                scores = outcome["positive"][HEADLINE], outcome["negative"][HEADLINE]
            lines += [f"{pair.positive.stem} {scores[0]!r}\n", f"{pair.negative.stem} {scores[1]!r}\n"]
        path = output.with_suffix(".submission") / self.folder / f"{self.split}.txt"
        write_text(path, "".join(lines))
        return [path]

    def _wav(self, row: dict[str, str]) -> Path:
        return self.path / f"{row['filename'].removesuffix('.wav')}.wav"


class Swuggy(ZeroSpeechSuite):
    """A word against a non-word (sWUGGY)."""

    name, folder, columns = "swuggy", "lexical", ("frequency", "length")

    def question(self, row: dict[str, str]) -> tuple[str, dict[str, str]]:
        groups = {"length": row["length"]}
        try:
            frequency = float(row["frequency"])  # non-words have none
        except ValueError:
            return row["id"], groups
        band = next((name for bound, name in BANDS if frequency < bound), ">100")
        return row["id"], {"frequency": band, "vocabulary": "oov" if band == "oov" else "in", **groups}


class Sblimp(ZeroSpeechSuite):
    """A sentence against one that breaks a rule of grammar (sBLIMP)."""

    name, folder, columns = "sblimp", "syntactic", ("type", "subtype")

    def question(self, row: dict[str, str]) -> tuple[str, dict[str, str]]:
        unit = " ".join((row["type"], row["subtype"], row["id"]))
        return unit, {"type": row["type"], "subtype": row["subtype"]}


def _rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    try:
        reader = csv.DictReader(io.StringIO(read_text(path, DataError, limit=1 << 30)))
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error):
        raise DataError(f"{path}: not readable as CSV") from None
    absent = [name for name in columns if name not in (reader.fieldnames or ())]
    if absent:
        raise DataError(f"{path}: has no column {absent[0]!r}; it must have {', '.join(columns)}")
    for number, row in enumerate(rows, start=2):
        if any(row[name] is None for name in columns):
            raise DataError(f"{path}, line {number}: has fewer columns than the header")
    if not rows:
        raise DataError(f"{path}: has no rows")
    return rows
