"""Evaluation suites: manifests in, one result dictionary out (the report's and the table's input).

A result holds ``suite``, ``set``, ``num_utterances``, ``wer`` (a fraction), ``normalizer`` (what both texts went
through before words were compared) and ``items``: one dictionary per utterance with ``id``, ``reference`` and
``hypothesis``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_most.audio import AudioCodec, write_wav
from megatron_most.data.building.tasks import prompt
from megatron_most.data.preparation.manifest import Record, read_waveform
from megatron_most.evaluation.recognizer import Recognizer
from megatron_most.evaluation.wer import NORMALIZERS, word_errors
from megatron_most.inference import LoadedModel, Sampling, speak, transcribe

MAX_NEW_TEXT = 256
MAX_SPEECH_SECONDS = 30.0
"""Bounds of one answer, within what the model's sequence length leaves."""


def encode_records(codec: AudioCodec, records: Sequence[Record]) -> list[np.ndarray]:
    """Codes ``[F, C]`` of each record's audio."""
    return [codec.encode(read_waveform(record, codec.sample_rate)) for record in records]


def evaluate_asr(
    model: LoadedModel,
    set_name: str,
    records: Sequence[Record],
    codes: Sequence[np.ndarray] | None = None,
    max_new: int = MAX_NEW_TEXT,
    normalizer: str = NORMALIZERS[0],
) -> dict[str, Any]:
    """Transcribe greedily and compare with the manifest's text.

    Args:
        codes: the records' codes, where they are known, to save encoding the audio again.
        max_new: longest transcript in text ids; the model's sequence length bounds it too.
        normalizer: of :data:`~megatron_most.evaluation.wer.NORMALIZERS`.
    """
    codes = encode_records(model.codec, records) if codes is None else codes
    vocab, tokenizer = model.config.vocab, model.tokenizer
    longest = max(codes, key=len)
    room = model.config.data.seq_length - len(prompt("asr", vocab, tokenizer, codes=longest).ids)
    hypotheses = transcribe(model, codes, max_new=max(1, min(max_new, room)))
    return _result("asr", set_name, records, hypotheses, normalizer)


def evaluate_tts(
    model: LoadedModel,
    set_name: str,
    records: Sequence[Record],
    recognizer: Recognizer,
    sampling: Sampling | None = None,
    max_seconds: float = MAX_SPEECH_SECONDS,
    samples: Path | None = None,
    num_samples: int = 0,
    normalizer: str = NORMALIZERS[0],
) -> dict[str, Any]:
    """Speak each text and let an independent recognizer read it back; the WER is the recognizer's.

    Args:
        samples: folder for the WAV files of the first ``num_samples`` utterances, named ``<set>_<id>_generated.wav``
            (``_`` for what is no letter, digit, dot or hyphen); items then carry their path under ``generated_wav``,
            relative to the folder's parent.
    """
    spoken = speak(model, [record.text for record in records], max_seconds, sampling)
    waveforms = [model.codec.decode(codes) for codes in spoken]
    return _recognized(
        "tts",
        set_name,
        records,
        waveforms,
        model.codec.sample_rate,
        recognizer,
        "generated",
        samples,
        num_samples,
        normalizer,
    )


def evaluate_reference_audio(
    codec: AudioCodec,
    set_name: str,
    records: Sequence[Record],
    recognizer: Recognizer,
    codes: Sequence[np.ndarray] | None = None,
    samples: Path | None = None,
    num_samples: int = 0,
    normalizer: str = NORMALIZERS[0],
) -> dict[str, Any]:
    """What the same recognizer makes of the originals or, given their ``codes``, of the codec's round trip.

    It bounds what :func:`evaluate_tts` can reach.
    """
    if codes is None:
        kind, waveforms = "original", [read_waveform(record, codec.sample_rate) for record in records]
    else:
        kind, waveforms = "roundtrip", [codec.decode(utterance) for utterance in codes]
    return _recognized(
        kind, set_name, records, waveforms, codec.sample_rate, recognizer, kind, samples, num_samples, normalizer
    )


def _recognized(
    suite: str,
    set_name: str,
    records: Sequence[Record],
    waveforms: Sequence[np.ndarray],
    sample_rate: int,
    recognizer: Recognizer,
    kind: str,
    samples: Path | None,
    num_samples: int,
    normalizer: str,
) -> dict[str, Any]:
    hypotheses = [recognizer.transcribe(waveform, sample_rate) for waveform in waveforms]
    result = _result(suite, set_name, records, hypotheses, normalizer)
    if samples is not None:
        for item, waveform in list(zip(result["items"], waveforms, strict=True))[:num_samples]:
            # Ids may hold anything, slashes and dots too.
            path = samples / re.sub(r"[^\w.-]", "_", f"{set_name}_{item['id']}_{kind}.wav")
            write_wav(path, waveform, sample_rate)
            item[f"{kind}_wav"] = f"{samples.name}/{path.name}"
    return result


def _result(
    suite: str, set_name: str, records: Sequence[Record], hypotheses: Sequence[str], normalizer: str
) -> dict[str, Any]:
    references = [record.text for record in records]
    return {
        "suite": suite,
        "set": set_name,
        "num_utterances": len(records),
        "wer": word_errors(references, hypotheses, normalizer).wer,
        "normalizer": normalizer,
        "items": [
            {"id": record.id, "reference": record.text, "hypothesis": hypothesis}
            for record, hypothesis in zip(records, hypotheses, strict=True)
        ],
    }
