"""Hypotheses beside their references with the errors marked, and the table of error rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_most.errors import DataError
from megatron_most.evaluation.wer import Edit, WordErrors, word_errors
from megatron_most.report.run_files import RunFiles, number

_NORMALIZER_OF_OLD_RESULTS = "basic"  # results that name none come from a version that had no other

_LONGEST_TEXT = 100_000
"""Letters of an utterance; the time to align grows with the square."""

MAX_WITH_ERRORS = 16
MAX_CORRECT = 4

SUITES = {
    "asr": "ASR: the model's transcript",
    "tts": "TTS: generated speech, as the recognizer heard it",
    "roundtrip": "Codec round trip, as the recognizer heard it",
    "original": "Original recording, as the recognizer heard it",
}
"""Title of each suite, in the order in which they are shown."""

SHORT_NAMES = {"asr": "ASR", "tts": "TTS", "roundtrip": "codec round trip", "original": "original recording"}


@dataclass(frozen=True)
class Rate:
    """A word error rate, a fraction, over so many utterances, with its bootstrap interval if it was recorded."""

    value: float
    count: int
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Transcript:
    """One utterance.

    Args:
        remark: that the answer failed or reached its limit; empty otherwise.
    """

    id: str
    edits: tuple[Edit, ...]
    num_errors: int
    remark: str

    @property
    def reference(self) -> str:
        return " ".join(word for edit in self.edits for word in edit.reference)


@dataclass(frozen=True)
class TranscriptTable:
    """One suite on one set.

    Args:
        rate: as the evaluation reported it; None if it did not.
        errors: counts over the utterances that the file lists.
        shown: the utterances with most errors first, then a few without.
    """

    suite: str
    set_name: str
    rate: Rate | None
    errors: WordErrors
    num_utterances: int
    num_with_errors: int
    shown: list[Transcript]

    @property
    def title(self) -> str:
        return SUITES.get(self.suite, self.suite)


def transcript_tables(run: RunFiles) -> list[TranscriptTable]:
    """A table for every evaluation, in the order of :data:`SUITES`; a note for each that cannot be aligned."""
    tables = []
    for name, result in run.evaluation.items():
        if "items" not in result and "score" in result:
            continue  # its suite has no transcripts
        items = [item for item in result.get("items", []) if _is_text(item)]
        if not items:
            run.notes.append(f"evaluation/{name}.json lists no utterances.")
            continue
        try:
            references, hypotheses = ([item[side] for item in items] for side in ("reference", "hypothesis"))
            normalizer = str(result.get("normalizer", _NORMALIZER_OF_OLD_RESULTS))
            errors = word_errors(references, hypotheses, normalizer)
        except DataError as error:
            run.notes.append(f"evaluation/{name}.json is left out of the transcripts: {error}.")
            continue
        transcripts = [
            Transcript(str(item.get("id", "")), utterance.edits, utterance.num_errors, _remark(item))
            for item, utterance in zip(items, errors.utterances, strict=True)
        ]
        wrong = sorted((one for one in transcripts if one.num_errors), key=lambda one: -one.num_errors)
        correct = [one for one in transcripts if not one.num_errors]
        tables.append(
            TranscriptTable(
                str(result.get("suite", name)),
                str(result.get("set", "")),
                _rate(result),
                errors,
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
    if not isinstance(item, dict):
        return False
    texts = [item.get(key) for key in ("reference", "hypothesis")]
    return all(isinstance(text, str) and len(text) <= _LONGEST_TEXT for text in texts)


def _remark(item: dict[str, Any]) -> str:
    if "failed" in item:
        return f"failed: {item['failed']}"
    return "reached its limit, so the end may be missing" if item.get("at_limit") is True else ""


def _rate(result: dict[str, Any]) -> Rate | None:
    value = number(result.get("wer"))
    if value is None:
        return None
    count = number(result.get("num_utterances"))
    ends = result.get("wer_interval")
    low, high = map(number, ends) if isinstance(ends, list) and len(ends) == 2 else (None, None)
    interval = (low, high) if low is not None and high is not None else None
    return Rate(value, int(count if count is not None else len(result.get("items", []))), interval)


def error_rates(run: RunFiles) -> tuple[list[str], list[tuple[str, list[Rate | None]]]]:
    """The table of word error rates: the suites, and for each set its name and a rate or None for each suite."""
    found: dict[str, dict[str, Rate]] = {name: {} for name in run.sets}
    for name, result in run.evaluation.items():
        if (rate := _rate(result)) is not None:
            found[str(result.get("set", ""))][str(result.get("suite", name))] = rate
    present = {suite for rates in found.values() for suite in rates}
    suites = [suite for suite in SUITES if suite in present] + sorted(present - set(SUITES))
    return suites, [(name, [rates.get(suite) for suite in suites]) for name, rates in found.items() if rates]
