"""Texts cut into documents that together predict every token once, to measure how well a model predicts text.

A text longer than the context is cut into windows as lm-evaluation-harness does: every token is predicted once, after
the beginning of sequence or, in later windows, after the token before; the last window is filled up with context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_most.data.preparation.manifest import read_manifest
from megatron_most.data.storage.documents import Document
from megatron_most.errors import DataError
from megatron_most.files import read_text
from megatron_most.vocab import VocabLayout

MAX_BYTES = 1 << 30


def read_texts(path: str | Path) -> dict[str, str]:
    """Name -> text: a ``.txt`` file, which is one text, or the texts of a manifest (``.jsonl``) by their ids.

    Raises:
        DataError: the file cannot be read.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        return {record.id: record.text for record in read_manifest(path, needs_audio=False)}
    try:
        return {path.name: read_text(path, DataError, limit=MAX_BYTES)}
    except UnicodeDecodeError:
        raise DataError(f"{path}: must be UTF-8 text") from None


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
