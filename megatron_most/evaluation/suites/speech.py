"""ASR and TTS: the records of a manifest, and the word error rate of what the model writes or says.

The result also has ``num_utterances``, ``num_at_limit``, ``wer`` (a fraction), ``wer_interval``, ``normalizer``,
``mean_utterance_wer``, and ``items``: for each utterance ``id``, ``reference``, ``hypothesis`` and where they apply

    at_limit   true where generation stopped at its limit, so that the end of the answer may be missing
    failed     why there is no answer. Its hypothesis is empty: all words of its reference count as errors.
    *_wav      files of its sound
    scores     of scorers, by name; ``unscored`` says why values are missing
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_most.audio import AudioCodec, write_wav
from megatron_most.data.building.tasks import prompt
from megatron_most.data.preparation.manifest import Record, read_waveform
from megatron_most.data.storage.documents import Document
from megatron_most.errors import DataError
from megatron_most.evaluation.interface import Generated, Model, require_room
from megatron_most.evaluation.normalization import check_normalizer, default_normalizer, text_normalizer
from megatron_most.evaluation.recognizers import Recognizer
from megatron_most.evaluation.scorers.scoring import Scoring
from megatron_most.evaluation.suites.base import Interval, Outcome, Suite, attempt
from megatron_most.evaluation.wer import aligned
from megatron_most.inference import Decoding


@dataclass(frozen=True)
class EvaluationSet:
    """What is evaluated, and how.

    Args:
        name: of the set, for tables.
        normalizer: as for :func:`~megatron_most.evaluation.wer.word_errors`.
        samples: folder for WAV files of the first ``num_samples`` utterances, named ``<set>_<id>_<kind>.wav`` (``_``
            replaces all but letters, digits, dots and hyphens). Items name them, relative to the folder's parent.
    """

    name: str
    records: Sequence[Record]
    normalizer: str | None = None
    samples: Path | None = None
    num_samples: int = 0


Codes = Sequence[np.ndarray | DataError]
"""For each record: the codes ``[F, C]`` of its audio, or why there are none."""


def encode_records(codec: AudioCodec, records: Sequence[Record]) -> Codes:
    """The codes of each record's audio. A recording that cannot be read does not stop the others."""
    waveforms = [attempt(read_waveform, record, codec.sample_rate) for record in records]
    return [attempt(codec.encode, waveform) for waveform in waveforms]


class WordErrorSuite(Suite[Record]):
    """Hypotheses against the texts of records.

    Raises:
        DataError: no such normalizer, one for another language, or references without words.
    """

    metric, lower_is_better = "wer", True

    def __init__(self, evaluated: EvaluationSet) -> None:
        self.evaluated, self.set_name = evaluated, evaluated.name
        references = [record.text for record in evaluated.records]
        self.normalizer = evaluated.normalizer or default_normalizer(references)
        normalize = text_normalizer(self.normalizer)
        check_normalizer(self.normalizer, references)
        if references and not any(map(normalize, references)):
            raise DataError(f"{self.set_name}: word error rate needs reference words, the references have none")

    @property
    def samples(self) -> Sequence[Record]:
        return self.evaluated.records

    @property
    def settings(self) -> dict[str, Any]:
        return {"normalizer": self.normalizer}

    def judged(self, records: Sequence[Record], hypotheses: Sequence[Any], further: Sequence[Outcome]) -> list[Outcome]:
        """Outcomes of hypotheses, some of which are errors instead."""
        texts = ["" if isinstance(text, DataError) else str(text) for text in hypotheses]
        errors = aligned([record.text for record in records], texts, self.normalizer)
        found: list[Outcome] = []
        for record, text, hypothesis, utterance, more in zip(records, texts, hypotheses, errors, further, strict=True):
            outcome = {
                "id": record.id,
                "value": utterance.num_errors,
                "weight": utterance.num_reference_words,
                "reference": record.text,
                "hypothesis": text,
                **more,
            }
            found.append(outcome | {"failed": str(hypothesis)} if isinstance(hypothesis, DataError) else outcome)
        return found

    def failure(self, sample: Record, reason: str) -> Outcome:
        return self.judged([sample], [DataError(reason)], [{}])[0]

    def summary(self, outcomes: Sequence[Outcome], score: float, interval: Interval) -> dict[str, Any]:
        rates = [outcome["value"] / outcome["weight"] for outcome in outcomes if outcome["weight"]]
        kept = [{k: v for k, v in outcome.items() if k not in ("value", "weight")} for outcome in outcomes]
        return {
            "num_utterances": len(outcomes),
            "num_at_limit": sum(outcome.get("at_limit", False) for outcome in outcomes),
            "wer": score,
            "wer_interval": interval,
            "mean_utterance_wer": sum(rates) / len(rates),
            "normalizer": self.normalizer,
            "items": kept,
        }


class AsrSuite(WordErrorSuite):
    """Transcribe and compare with the manifest's text.

    Args:
        codes: of the records, where they are known, to save encoding the audio again.
    """

    name = "asr"

    def __init__(self, evaluated: EvaluationSet, decoding: Decoding | None = None, codes: Codes | None = None) -> None:
        super().__init__(evaluated)
        self.decoding = decoding or Decoding()
        self._codes = None if codes is None else dict(zip((r.id for r in evaluated.records), codes, strict=True))

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "decoding": self.decoding.to_dict()}

    def outcomes(self, model: Model, samples: Sequence[Record]) -> list[Outcome]:
        if self._codes is None:
            codes = encode_records(model.codec, samples)
        else:
            codes = [self._codes[record.id] for record in samples]
        prompts = [attempt(_asr_prompt, model, found) for found in codes]
        answers = _generated(model, prompts, self.decoding, speech=False)
        texts = [answer.text if isinstance(answer, Generated) else answer for answer in answers]
        return self.judged(samples, texts, _limits(answers))


class HeardSuite(WordErrorSuite):
    """What an independent recognizer hears; the word error rate is the recognizer's, too."""

    kind: str
    """Of the sound, in names of files."""

    def __init__(self, evaluated: EvaluationSet, recognizer: Recognizer, scoring: Scoring | None = None) -> None:
        super().__init__(evaluated)
        self.recognizer, self.scoring = recognizer, scoring
        self._kept = {record.id for record in evaluated.records[: evaluated.num_samples]}

    @property
    def settings(self) -> dict[str, Any]:
        scorers = {"scorers": self.scoring.settings} if self.scoring else {}
        return {**super().settings, "recognizer": self.recognizer.name, **scorers}

    @abstractmethod
    def sounds(self, model: Model, samples: Sequence[Record]) -> tuple[list[Any], int, list[Outcome]]:
        """Waveform or error of each record, the sample rate, and what else to keep of each."""

    def outcomes(self, model: Model, samples: Sequence[Record]) -> list[Outcome]:
        waveforms, sample_rate, further = self.sounds(model, samples)
        hypotheses = [attempt(self.recognizer.transcribe, waveform, sample_rate) for waveform in waveforms]
        for record, waveform, more in zip(samples, waveforms, further, strict=True):
            if self.evaluated.samples is not None and record.id in self._kept and not isinstance(waveform, DataError):
                more[f"{self.kind}_wav"] = self._write(record, waveform, sample_rate)
            if self.scoring is not None:
                more |= self.scoring.of(record, waveform, sample_rate)
        return self.judged(samples, hypotheses, further)

    def summary(self, outcomes: Sequence[Outcome], score: float, interval: Interval) -> dict[str, Any]:
        scores = {"scores": self.scoring.summary(outcomes)} if self.scoring else {}
        return {**super().summary(outcomes, score, interval), **scores}

    def _write(self, record: Record, waveform: np.ndarray, sample_rate: int) -> str:
        assert self.evaluated.samples is not None
        # Ids may hold anything, slashes and dots too.
        name = re.sub(r"[^\w.-]", "_", f"{self.set_name}_{record.id}_{self.kind}.wav")
        write_wav(self.evaluated.samples / name, waveform, sample_rate)
        return f"{self.evaluated.samples.name}/{name}"


class TtsSuite(HeardSuite):
    """Speak each text and let an independent recognizer read it back, and scorers judge how it sounds."""

    name, kind = "tts", "generated"

    def __init__(
        self,
        evaluated: EvaluationSet,
        recognizer: Recognizer,
        decoding: Decoding | None = None,
        scoring: Scoring | None = None,
    ) -> None:
        super().__init__(evaluated, recognizer, scoring)
        self.decoding = decoding or Decoding()

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "decoding": self.decoding.to_dict()}

    def sounds(self, model: Model, samples: Sequence[Record]) -> tuple[list[Any], int, list[Outcome]]:
        prompts = [attempt(_tts_prompt, model, record.text) for record in samples]
        answers = _generated(model, prompts, self.decoding, speech=True)
        codes = [answer.codes if isinstance(answer, Generated) else answer for answer in answers]
        waveforms = [attempt(model.codec.decode, found) for found in codes]
        return waveforms, model.codec.sample_rate, _limits(answers)


class ReferenceAudioSuite(HeardSuite):
    """What the recognizer makes of the originals or, given their ``codes``, of the codec's round trip.

    It bounds what :class:`TtsSuite` can reach. No model is asked.
    """

    def __init__(
        self, codec: AudioCodec, evaluated: EvaluationSet, recognizer: Recognizer, codes: Codes | None = None
    ) -> None:
        super().__init__(evaluated, recognizer)
        self.codec = codec
        self._codes = None if codes is None else dict(zip((r.id for r in evaluated.records), codes, strict=True))
        self.kind = "original" if codes is None else "roundtrip"

    @property
    def name(self) -> str:  # type: ignore[override]  # one of two
        return self.kind

    def sounds(self, model: Model, samples: Sequence[Record]) -> tuple[list[Any], int, list[Outcome]]:
        codec = self.codec
        if self._codes is None:
            waveforms = [attempt(read_waveform, record, codec.sample_rate) for record in samples]
        else:
            waveforms = [attempt(codec.decode, self._codes[record.id]) for record in samples]
        return waveforms, codec.sample_rate, [{} for _ in samples]


def _asr_prompt(model: Model, codes: np.ndarray) -> Document:
    return require_room(model, prompt("asr", model.vocab, model.tokenizer, codes=codes, where="audio"), 1)


def _tts_prompt(model: Model, text: str) -> Document:
    document = prompt("tts", model.vocab, model.tokenizer, text=text, where="text")
    return require_room(model, document, model.vocab.codec_layout.num_positions(1))


def _generated(
    model: Model, prompts: Sequence[Document | DataError], decoding: Decoding, *, speech: bool
) -> list[Generated | DataError]:
    """Answers to all prompts but those that have failed, which stay."""
    working = [one for one in prompts if not isinstance(one, DataError)]
    answers = iter(model.generate(working, decoding, speech=speech))
    return [one if isinstance(one, DataError) else next(answers) for one in prompts]


def _limits(answers: Sequence[Generated | DataError]) -> list[Outcome]:
    return [{"at_limit": True} if isinstance(one, Generated) and one.at_limit else {} for one in answers]
