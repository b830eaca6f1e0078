"""Perplexity of text: how well a model predicts a file of it.

    bits per byte = negative log-likelihood / ln 2 / UTF-8 bytes      (headline: comparable between tokenizers)
    perplexity    = exp(negative log-likelihood / tokens)

A text longer than the context is cut into windows as lm-evaluation-harness does: every token is predicted once, after
the beginning of sequence or, in later windows, after the token before; the last window is filled up with context.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_most.data.preparation.manifest import read_manifest
from megatron_most.data.storage.documents import Document
from megatron_most.errors import DataError
from megatron_most.evaluation.interface import Model
from megatron_most.evaluation.suites.base import Interval, Outcome, Suite
from megatron_most.files import read_text
from megatron_most.vocab import VocabLayout

MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Window:
    """Some of the tokens of a text, and its share of the text's bytes."""

    id: str
    document: Document
    num_bytes: float


class TextSuite(Suite[Window]):
    """Bits per byte of a ``.txt`` file, which is one text, or of the texts of a manifest (``.jsonl``).

    Raises:
        DataError: the file cannot be read, or a text is empty.
    """

    name, metric, lower_is_better = "text", "bits_per_byte", True

    def __init__(self, path: str | Path, limit: int | None = None) -> None:
        path = Path(path)
        self.set_name = path.stem
        if path.suffix == ".jsonl":
            self._texts = {record.id: record.text for record in read_manifest(path, needs_audio=False)[:limit]}
        else:
            try:
                self._texts = {path.name: read_text(path, DataError, limit=MAX_BYTES)}
            except UnicodeDecodeError:
                raise DataError(f"{path}: must be UTF-8 text") from None
        self._limit = None if path.suffix == ".jsonl" else limit
        self._windows: list[Window] = []

    def bind(self, model: Model) -> None:
        self._windows = []
        for name, text in self._texts.items():
            ids = model.tokenizer.encode(text)
            if not ids:
                raise DataError(f"{self.set_name}: {name}: text is empty")
            share = len(text.encode()) / len(ids)
            for number, document in enumerate(windows(model.vocab, ids, model.tokenizer.bos_id, model.context)):
                self._windows.append(Window(f"{name}#{number}", document, share * int(document.loss_mask.sum())))
        self._windows = self._windows[: self._limit]

    @property
    def samples(self) -> Sequence[Window]:
        return self._windows

    def outcomes(self, model: Model, samples: Sequence[Window]) -> list[Outcome]:
        found = model.loglikelihood([window.document for window in samples])
        return [
            {
                "id": window.id,
                "value": -float(one.own.sum()) / math.log(2),
                "weight": window.num_bytes,
                "tokens": one.count,
                "nats": -float(one.own.sum()),
                "whole_nats": -float(one.whole.sum()),
            }
            for window, one in zip(samples, found, strict=True)
        ]

    def failure(self, sample: Window, reason: str) -> Outcome:
        raise AssertionError("a window fits, whatever the model")

    def summary(self, outcomes: Sequence[Outcome], score: float, interval: Interval) -> dict[str, Any]:
        tokens, num_bytes = (sum(outcome[name] for outcome in outcomes) for name in ("tokens", "weight"))
        nats, whole = (sum(outcome[name] for outcome in outcomes) for name in ("nats", "whole_nats"))
        return {
            "perplexity": math.exp(nats / tokens),
            "num_tokens": tokens,
            "num_bytes": round(num_bytes),
            # With a softmax over the whole vocabulary, audio ids included.
            "whole": {"bits_per_byte": whole / math.log(2) / num_bytes, "perplexity": math.exp(whole / tokens)},
        }


def windows(vocab: VocabLayout, ids: Sequence[int], prefix: int, context: int) -> Iterator[Document]:
    """Documents that together predict each of ``ids`` once, each from at most ``context`` positions before.

    Args:
        prefix: the id before the first.
    """
    start = 0
    while start < len(ids):
        stop = min(start + context, len(ids))
        first = max(stop - context, 0) if start else 0
        before = [prefix, *ids[:start]] if first == 0 else list(ids[first - 1 : start])
        yield text_document(vocab, before, ids[start:stop])
        start = stop


def text_document(vocab: VocabLayout, before: Sequence[int], targets: Sequence[int]) -> Document:
    """Ids to score after others."""
    ids = np.array([*before, *targets], dtype=np.int64)
    document = Document(ids, np.arange(len(ids)) >= len(before))
    if vocab.codec_layout.uses_side_codes:
        document.coded, document.codes = np.empty(0, np.int64), np.empty((0, vocab.num_codebooks), np.int64)
    return document
