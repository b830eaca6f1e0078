"""Evaluation suites: the records of a manifest in, one result out, which reports and tables read.

A result is a dictionary: ``suite``, ``set``, ``num_utterances``, ``num_failed``, ``num_at_limit``, ``wer`` (a
fraction), ``wer_interval`` (its 95 % bootstrap interval, or null), ``normalizer``, and ``items``, one dictionary per
utterance with ``id``, ``reference`` and ``hypothesis``. An item also has

    at_limit   true where generation stopped at its limit, so that the end of the answer may be missing
    failed     why there is no answer. Its hypothesis is empty: all words of its reference count as errors.

No utterance changes the result of another.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_most.audio import AudioCodec, write_wav
from megatron_most.data.building.tasks import prompt
from megatron_most.data.preparation.manifest import Record, read_waveform
from megatron_most.data.storage.documents import Document
from megatron_most.errors import DataError
from megatron_most.evaluation.recognizer import Recognizer
from megatron_most.evaluation.wer import word_errors
from megatron_most.inference import LoadedModel, Sampling, speak, transcribe


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
    waveforms = [_attempt(read_waveform, record, codec.sample_rate) for record in records]
    return [_attempt(codec.encode, waveform) for waveform in waveforms]


def evaluate_asr(
    model: LoadedModel, evaluated: EvaluationSet, codes: Codes | None = None, max_new: int | None = None
) -> dict[str, Any]:
    """Transcribe greedily and compare with the manifest's text.

    Args:
        codes: of the records, where they are known, to save encoding the audio again.
        max_new: as for :func:`~megatron_most.inference.transcribe`.

    Raises:
        DataError: no utterance has an answer.
    """
    codes = encode_records(model.codec, evaluated.records) if codes is None else codes
    fitting = [_attempt(_codes_that_fit, model, found) for found in codes]
    texts, at_limit = _answers(fitting, functools.partial(transcribe, model, max_new=max_new))
    return _result("asr", evaluated, texts, at_limit)


def evaluate_tts(
    model: LoadedModel,
    evaluated: EvaluationSet,
    recognizer: Recognizer,
    sampling: Sampling | None = None,
    max_seconds: float | None = None,
) -> dict[str, Any]:
    """Speak each text and let an independent recognizer read it back; the WER is the recognizer's.

    Args:
        max_seconds: as for :func:`~megatron_most.inference.speak`.

    Raises:
        DataError: no utterance has an answer.
    """
    fitting = [_attempt(_text_that_fits, model, record.text) for record in evaluated.records]
    answer = functools.partial(speak, model, max_seconds=max_seconds, sampling=sampling)
    spoken, at_limit = _answers(fitting, answer)
    waveforms = [_attempt(model.codec.decode, codes) for codes in spoken]
    return _recognized("tts", evaluated, waveforms, model.codec.sample_rate, recognizer, at_limit)


def evaluate_reference_audio(
    codec: AudioCodec, evaluated: EvaluationSet, recognizer: Recognizer, codes: Codes | None = None
) -> dict[str, Any]:
    """What the same recognizer makes of the originals or, given their ``codes``, of the codec's round trip.

    It bounds what :func:`evaluate_tts` can reach.

    Raises:
        DataError: no utterance has sound.
    """
    if codes is None:
        suite = "original"
        waveforms = [_attempt(read_waveform, record, codec.sample_rate) for record in evaluated.records]
    else:
        suite, waveforms = "roundtrip", [_attempt(codec.decode, found) for found in codes]
    return _recognized(suite, evaluated, waveforms, codec.sample_rate, recognizer)


def _attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function`` returns, or the :class:`DataError` that it raises or is given."""
    for argument in arguments:
        if isinstance(argument, DataError):
            return argument
    try:
        return function(*arguments)
    except DataError as error:
        return error


def _codes_that_fit(model: LoadedModel, codes: np.ndarray) -> np.ndarray:
    _require_room(model, prompt("asr", model.config.vocab, model.tokenizer, codes=codes, where="audio"), 1)
    return codes


def _text_that_fits(model: LoadedModel, text: str) -> str:
    vocab = model.config.vocab
    document = prompt("tts", vocab, model.tokenizer, text=text, where="text")
    _require_room(model, document, vocab.codec_layout.num_positions(1))
    return text


def _require_room(model: LoadedModel, document: Document, needed: int) -> None:
    length, context = len(document.ids), model.config.data.seq_length
    if length + needed > context:
        raise DataError(f"a prompt of {length} positions leaves no room for an answer: data.seq_length is {context}")


def _answers(prompts: Sequence[Any], generate: Callable[..., Sequence[Any]]) -> tuple[list[Any], set[int]]:
    """Generate from all prompts but those that have failed, which stay; indices of the answers at their limit."""
    answers, at_limit = list(prompts), set[int]()
    working = [index for index, one in enumerate(prompts) if not isinstance(one, DataError)]
    generated = generate([prompts[index] for index in working], on_limit=lambda place: at_limit.add(working[place]))
    for index, answer in zip(working, generated, strict=True):
        answers[index] = answer
    return answers, at_limit


def _recognized(
    suite: str,
    evaluated: EvaluationSet,
    waveforms: Sequence[np.ndarray | DataError],
    sample_rate: int,
    recognizer: Recognizer,
    at_limit: Collection[int] = (),
) -> dict[str, Any]:
    hypotheses = [_attempt(recognizer.transcribe, waveform, sample_rate) for waveform in waveforms]
    result = _result(suite, evaluated, hypotheses, at_limit)
    if evaluated.samples is not None:
        kind = "generated" if suite == "tts" else suite
        for item, waveform in list(zip(result["items"], waveforms, strict=True))[: evaluated.num_samples]:
            if isinstance(waveform, DataError):
                continue
            # Ids may hold anything, slashes and dots too.
            path = evaluated.samples / re.sub(r"[^\w.-]", "_", f"{evaluated.name}_{item['id']}_{kind}.wav")
            write_wav(path, waveform, sample_rate)
            item[f"{kind}_wav"] = f"{evaluated.samples.name}/{path.name}"
    return result


def _result(
    suite: str, evaluated: EvaluationSet, hypotheses: Sequence[str | DataError], at_limit: Collection[int]
) -> dict[str, Any]:
    items: list[dict[str, Any]] = []
    for index, (record, hypothesis) in enumerate(zip(evaluated.records, hypotheses, strict=True)):
        item: dict[str, Any] = {"id": record.id, "reference": record.text, "hypothesis": hypothesis}
        if isinstance(hypothesis, DataError):
            item |= {"hypothesis": "", "failed": str(hypothesis)}
        if index in at_limit:
            item["at_limit"] = True
        items.append(item)
    failures = [item["failed"] for item in items if "failed" in item]
    if len(failures) == len(items):
        raise DataError(f"{evaluated.name}: no utterance could be evaluated{f': {failures[0]}' if failures else ''}")
    references, texts = ([item[side] for item in items] for side in ("reference", "hypothesis"))
    errors = word_errors(references, texts, evaluated.normalizer)
    return {
        "suite": suite,
        "set": evaluated.name,
        "num_utterances": len(items),
        "num_failed": len(failures),
        "num_at_limit": len(at_limit),
        "wer": errors.wer,
        "wer_interval": errors.interval(),
        "normalizer": errors.normalizer,
        "items": items,
    }
