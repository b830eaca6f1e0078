"""Perplexity of text: how well a model predicts a file of it.

    bits per byte = negative log-likelihood / ln 2 / UTF-8 bytes      (headline: comparable between tokenizers)
    perplexity    = exp(negative log-likelihood / tokens)

Texts that are longer than the context are cut (:mod:`megatron_most.data.building.text_windows`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_most.data.building.text_windows import read_texts, windows
from megatron_most.data.storage.documents import Document
from megatron_most.errors import DataError
from megatron_most.evaluation.interface import Model
from megatron_most.evaluation.suites.base import Interval, Outcome, Suite


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
        is_manifest = path.suffix == ".jsonl"
        self._texts = dict(list(read_texts(path).items())[: limit if is_manifest else None])
        self._limit = None if is_manifest else limit
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
