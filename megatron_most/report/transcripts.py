"""Hypotheses beside their references, every word with its fate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_most.errors import DataError
from megatron_most.evaluation.wer import Edit, WordErrors, word_errors
from megatron_most.report.run_files import RunFiles, number

_NORMALIZER_OF_OLD_RESULTS = "basic"  # there was no other when they did not name theirs

MAX_WITH_ERRORS = 16
MAX_CORRECT = 4

SUITES = {
    "asr": "ASR: the model's transcript",
    "tts": "TTS: generated speech, as the recognizer heard it",
    "roundtrip": "Codec round trip, as the recognizer heard it",
    "original": "Original recording, as the recognizer heard it",
}
"""How a suite is called, in the order in which suites are shown."""

SHORT_NAMES = {"asr": "ASR", "tts": "TTS", "roundtrip": "codec round trip", "original": "original recording"}


@dataclass(frozen=True)
class Transcript:
    """One utterance: its alignment and how many errors it holds."""

    id: str
    edits: tuple[Edit, ...]
    num_errors: int

    @property
    def reference(self) -> str:
        return " ".join(word for edit in self.edits for word in edit.reference)


@dataclass(frozen=True)
class TranscriptTable:
    """One suite on one set.

    Args:
        wer: as the evaluation reported it, a fraction; None when it did not.
        errors: the counts over the utterances that the file lists.
        normalizer: what both texts went through.
        shown: the worst utterances first, then a few without error.
    """

    suite: str
    set_name: str
    wer: float | None
    errors: WordErrors
    normalizer: str
    num_utterances: int
    num_with_errors: int
    shown: list[Transcript]

    @property
    def title(self) -> str:
        return SUITES.get(self.suite, self.suite)


def transcript_tables(run: RunFiles) -> list[TranscriptTable]:
    """A table for every evaluation file with texts, ASR first; a file that cannot be aligned becomes a note."""
    tables = []
    for name, result in run.evaluation.items():
        items = [item for item in result.get("items", []) if _is_text(item)]
        if not items:
            run.notes.append(f"evaluation/{name}.json lists no utterances.")
            continue
        try:
            texts = ([item[side] for item in items] for side in ("reference", "hypothesis"))
            normalizer = str(result.get("normalizer", _NORMALIZER_OF_OLD_RESULTS))
            errors = word_errors(*texts, normalizer)
        except DataError as error:
            run.notes.append(f"evaluation/{name}.json is left out of the transcripts: {error}.")
            continue
        transcripts = [
            Transcript(str(item.get("id", "")), utterance.edits, utterance.num_errors)
            for item, utterance in zip(items, errors.utterances, strict=True)
        ]
        wrong = sorted((one for one in transcripts if one.num_errors), key=lambda one: -one.num_errors)
        correct = [one for one in transcripts if not one.num_errors]
        tables.append(
            TranscriptTable(
                str(result.get("suite", name)),
                str(result.get("set", "")),
                number(result.get("wer")),
                errors,
                normalizer,
                len(items),
                len(wrong),
                wrong[:MAX_WITH_ERRORS] + correct[:MAX_CORRECT],
            )
        )
    suites, sets = list(SUITES), run.sets
    return sorted(
        tables,
        key=lambda one: (suites.index(one.suite) if one.suite in suites else len(suites), sets.index(one.set_name)),
    )


def _is_text(item: Any) -> bool:
    return isinstance(item, dict) and all(isinstance(item.get(key), str) for key in ("reference", "hypothesis"))


def error_rates(run: RunFiles) -> tuple[list[str], list[tuple[str, list[tuple[float, int] | None]]]]:
    """The table of word error rates: names of the suites, and for each set (rate, utterances) or None per suite."""
    found: dict[str, dict[str, tuple[float, int]]] = {name: {} for name in run.sets}
    for name, result in run.evaluation.items():
        rate = number(result.get("wer"))
        if rate is not None:
            count = int(number(result.get("num_utterances")) or len(result.get("items", [])))
            found[str(result.get("set", ""))][str(result.get("suite", name))] = (rate, count)
    present = {suite for rates in found.values() for suite in rates}
    suites = [suite for suite in SUITES if suite in present] + sorted(present - set(SUITES))
    return suites, [(name, [rates.get(suite) for suite in suites]) for name, rates in found.items() if rates]
