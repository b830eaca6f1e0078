"""Pairs of recordings, of which the model should find one more likely: what is right, said, or unchanged.

A pair scores 1 if the positive is more likely, 0.5 if both are equally likely, else 0. Four readings are reported. The
likelihood of a recording is a mean over its positions, or their sum; and the softmax of a position runs over the ids of
its modality (``own``), or over the whole vocabulary (``whole``). The headline is ``own_mean``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_most.audio import read_audio
from megatron_most.data.storage.documents import Document
from megatron_most.errors import DataError
from megatron_most.evaluation.interface import Model, require_room, scored
from megatron_most.evaluation.likelihood import Likelihood
from megatron_most.evaluation.scores import interval, score, units_of
from megatron_most.evaluation.suites.base import Interval, Outcome, Suite, merged
from megatron_most.files import read_text

READINGS = ("own_mean", "own_sum", "whole_mean", "whole_sum")
HEADLINE = READINGS[0]


@dataclass(frozen=True)
class Pair:
    """Files of recordings (or texts, ``.txt``).

    Args:
        unit: what is one question, however many voices ask it.
        prompt: what stands before both, or None.
        groups: what to break the score down by: name -> value.
    """

    id: str
    unit: str
    positive: Path
    negative: Path
    prompt: Path | None = None
    groups: Mapping[str, str] = field(default_factory=dict)


class PairSuite(Suite[Pair]):
    """Likelihoods of pairs. A file that is missing or cannot be read makes its pair wrong."""

    def __init__(self, set_name: str, limit: int | None = None) -> None:
        self.set_name = set_name
        self._samples = self.read()[:limit]

    @abstractmethod
    def read(self) -> list[Pair]:
        """All pairs of the data set.

        Raises:
            DataError: the folder does not hold the data set, or not all of it.
        """

    @property
    def samples(self) -> Sequence[Pair]:
        return self._samples

    @property
    def settings(self) -> dict[str, Any]:
        return {"headline": HEADLINE}

    def outcomes(self, model: Model, samples: Sequence[Pair]) -> list[Outcome]:
        prepared, failures = self.try_each(samples, lambda pair: _documents(model, pair))
        found = model.loglikelihood([document for both in prepared for document in both])
        judged: list[Outcome] = []
        working = [pair for place, pair in enumerate(samples) if place not in failures]
        for place, (pair, documents) in enumerate(zip(working, prepared, strict=True)):
            judged.append(self._judged(pair, documents, found[2 * place], found[2 * place + 1]))
        return merged(len(samples), failures, judged)

    def failure(self, sample: Pair, reason: str) -> Outcome:
        return {**self._known(sample), "value": 0.0, "scores": dict.fromkeys(READINGS, 0.0), "failed": reason}

    def summary(self, outcomes: Sequence[Outcome], score: float, interval: Interval) -> dict[str, Any]:
        return {
            "chance": 0.5,
            "readings": {reading: _scored(outcomes, reading) for reading in READINGS},
            "breakdown": _breakdown(outcomes),
        }

    def _judged(
        self, pair: Pair, documents: tuple[Document, Document], positive: Likelihood, negative: Likelihood
    ) -> Outcome:
        # Where both recordings have the same codes, rounding must not decide.
        is_same = _is_same(*documents)
        scores = {
            reading: 0.5 if is_same else _preference(_read(positive, reading), _read(negative, reading))
            for reading in READINGS
        }
        sides = {"positive": positive, "negative": negative}
        return {
            **self._known(pair),
            "value": scores[HEADLINE],
            "scores": scores,
            **{name: {reading: _read(one, reading) for reading in READINGS} for name, one in sides.items()},
        }

    def _known(self, pair: Pair) -> Outcome:
        groups = {"groups": dict(pair.groups)} if pair.groups else {}
        return {"id": pair.id, "unit": pair.unit, **groups}


def _is_same(first: Document, second: Document) -> bool:
    if not np.array_equal(first.ids, second.ids):
        return False
    return first.codes is None or second.codes is None or np.array_equal(first.codes, second.codes)


def _read(likelihood: Likelihood, reading: str) -> float:
    values = likelihood.own if reading.startswith("own") else likelihood.whole
    return float(values.mean() if reading.endswith("mean") else values.sum())


def _preference(positive: float, negative: float) -> float:
    return 1.0 if positive > negative else 0.5 if positive == negative else 0.0


def _scored(outcomes: Sequence[Outcome], reading: str) -> dict[str, Any]:
    units = units_of([{**outcome, "value": outcome["scores"][reading]} for outcome in outcomes])
    return {"score": score(units), "interval": interval(units)}


def _breakdown(outcomes: Sequence[Outcome]) -> dict[str, dict[str, dict[str, float]]]:
    """Name of the group -> its values -> score of the headline, and number of units."""
    members: dict[str, dict[str, list[Outcome]]] = {}
    for outcome in outcomes:
        for name, value in outcome.get("groups", {}).items():
            members.setdefault(name, {}).setdefault(value, []).append(outcome)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, values in members.items():
        units = {value: units_of(of) for value, of in values.items()}
        found[name] = {value: {"score": score(units[value]), "num_units": len(units[value])} for value in units}
    return found


def _documents(model: Model, pair: Pair) -> tuple[Document, Document]:
    first, second = (_document(model, pair, path) for path in (pair.positive, pair.negative))
    return first, second


def _document(model: Model, pair: Pair, path: Path) -> Document:
    """The file after its prompt. A spoken prompt and what follows are one recording, and are scored together."""
    content = _content(model, path)
    before = None if pair.prompt is None else _content(model, pair.prompt)
    if isinstance(content, np.ndarray) and isinstance(before, np.ndarray):
        content, before = np.concatenate([before, content]), None
    segments = [
        one if isinstance(one, str) else model.codec.encode(one) for one in (before, content) if one is not None
    ]
    document = scored(model.vocab, model.tokenizer, segments[:-1], segments[-1:], str(path))
    return require_room(model, document)


def _content(model: Model, path: Path) -> str | np.ndarray:
    if path.suffix != ".txt":
        return read_audio(path, model.codec.sample_rate)
    try:
        return read_text(path, DataError).strip()
    except UnicodeDecodeError:
        raise DataError(f"{path}: must be UTF-8 text") from None
