"""Scores of the speech of a set: every item's, and their means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_most.data.preparation.manifest import Record, read_waveform
from megatron_most.errors import ConfigError, DataError
from megatron_most.evaluation.scorers import Reference, Scorer, Sound
from megatron_most.evaluation.scores import interval, score, units_of

RECORDING, VOICE_OF_RECORDING = "recording of the same text", "voice of the recording of the same text"


class Scoring:
    """Scorers with what they compare with.

    Args:
        records: of the set; their audio is the recording of the text.
        voices: by id, recordings of the voice to speak with; None: those of the records.
        voice_is: what they are, for results.

    Raises:
        ConfigError: two scorers give the same value, or a record lacks what one compares with.
    """

    def __init__(
        self,
        scorers: Sequence[Scorer],
        records: Sequence[Record],
        voices: Mapping[str, Record] | None = None,
        voice_is: str = VOICE_OF_RECORDING,
    ) -> None:
        self.scorers = scorers
        recordings = {record.id: record for record in records}
        self._references: dict[Reference, Mapping[str, Record]] = {
            "recording": recordings,
            "voice": recordings if voices is None else voices,
        }
        self._means: dict[Reference, str] = {"recording": RECORDING, "voice": voice_is}
        seen: dict[str, str] = {}
        for scorer in scorers:
            for value in scorer.values:
                if value in seen:
                    raise ConfigError(f"--scorer: {seen[value]} and {scorer.name} both give {value}; evaluate twice")
                seen[value] = scorer.name
            if scorer.compared_with is None:
                continue
            found = self._references[scorer.compared_with]
            for record in records:
                if record.id not in found or found[record.id].audio is None:
                    raise ConfigError(
                        f"--scorer {scorer.name}: {record.where or record.id} has no audio to compare with"
                    )

    @property
    def settings(self) -> list[dict[str, Any]]:
        """What decides about the scores."""
        return [{"scorer": scorer.name, "compared_with": self._means_of(scorer)} for scorer in self.scorers]

    def _means_of(self, scorer: Scorer) -> str | None:
        return None if scorer.compared_with is None else self._means[scorer.compared_with]

    def of(self, record: Record, waveform: np.ndarray | DataError, sample_rate: int) -> dict[str, Any]:
        """``scores`` of the speech of a record, and in ``unscored`` why values are missing."""
        scores: dict[str, float] = {}
        unscored: dict[str, str] = {}
        for scorer in self.scorers:
            try:
                if isinstance(waveform, DataError):
                    raise waveform
                scores |= self._score(scorer, record, Sound(waveform, sample_rate))
            except DataError as error:
                unscored |= dict.fromkeys(scorer.values, str(error))
        return {"scores": scores, **({"unscored": unscored} if unscored else {})}

    def _score(self, scorer: Scorer, record: Record, spoken: Sound) -> dict[str, float]:
        reference = None
        if scorer.compared_with is not None:
            wanted = self._references[scorer.compared_with][record.id]
            reference = Sound(read_waveform(wanted, spoken.sample_rate), spoken.sample_rate)
        found = scorer.score(spoken, reference)
        if not np.isfinite(list(found.values())).all():
            raise DataError(f"{scorer.name} gives no number")
        return found

    def summary(self, outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """For each value its mean with interval, by whom, against what, and the items that could not be scored."""
        return {
            name: self._mean(scorer, name, worst, outcomes)
            for scorer in self.scorers
            for name, worst in scorer.values.items()
        }

    def _mean(self, scorer: Scorer, name: str, worst: float, outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        rows, failed = [], []
        for outcome in outcomes:
            value = outcome.get("scores", {}).get(name)
            if value is None:
                reason = outcome.get("unscored", {}).get(name) or outcome.get("failed", "not scored")
                failed.append({"id": outcome["id"], "failed": reason})
            rows.append({"id": outcome["id"], "value": worst if value is None else value})
        units = units_of(rows)
        return {
            "score": score(units),
            "interval": interval(units),
            "scorer": scorer.name,
            "compared_with": self._means_of(scorer),
            "num_failed": len(failed),
            "failed_counts_as": worst,
            "failed": failed,
        }
