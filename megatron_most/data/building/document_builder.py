"""How templates put a document together.

Shape letters: n positions of a document, C codebooks, F codec frames.
"""

from __future__ import annotations

import numpy as np

from megatron_most.data.storage.documents import Document
from megatron_most.errors import DataError
from megatron_most.text import TextTokenizer
from megatron_most.vocab import NO_CODE, VocabLayout

LOSSES = ("targets", "everything")
"""What carries the loss: what the template says is to be predicted, or every id after the first."""


class DocumentBuilder:
    """Collects the pieces of a document in order; a piece with ``target`` carries loss.

    Args:
        where: what errors call this document.
    """

    def __init__(self, vocab: VocabLayout, tokenizer: TextTokenizer, where: str) -> None:
        self.vocab, self.tokenizer, self.where = vocab, tokenizer, where
        self._ids: list[np.ndarray] = []
        self._codes: list[np.ndarray] = []
        self._targets: list[np.ndarray] = []

    def id(self, token: int, *, target: bool = False) -> None:
        self._add(np.array([token], dtype=np.int64), None, target)

    def text(self, text: str | None, before: str = "", *, target: bool = False) -> None:
        """Text without white space at its ends, after ``before``. Raises :class:`DataError` when there is none."""
        stripped = (text or "").strip()
        if not stripped:
            raise DataError(f"{self.where}: text is empty")
        self.text_ids(np.array(self.tokenizer.encode(before + stripped), dtype=np.int64), target=target)

    def text_ids(self, ids: np.ndarray, *, target: bool = False) -> None:
        if ids.size and ids.max() >= self.vocab.text_vocab_size:
            raise DataError(
                f"{self.where}: text id {ids.max()} is outside the layout's {self.vocab.text_vocab_size} text ids"
            )
        self._add(ids, None, target)

    def frames(self, codes: np.ndarray | None, *, target: bool = False) -> None:
        """Codes ``[C, F]``; raises :class:`DataError` when there is no frame, or a code outside its codebook."""
        if codes is None or codes.shape[-1] == 0:
            raise DataError(f"{self.where}: needs audio of at least one codec frame")
        self.vocab.check_codes(codes, self.where)
        self._add(*self.vocab.codec_layout.encode(codes), target)

    def audio(self, codes: np.ndarray | None, *, target: bool = False) -> None:
        """:meth:`frames` between their begin and end marks."""
        self.id(self.vocab.begin_of_audio, target=target)
        self.frames(codes, target=target)
        self.id(self.vocab.end_of_audio, target=target)

    def document(self, loss: str = "targets") -> Document:
        ids = np.concatenate(self._ids)
        codes = np.concatenate(self._codes) if self.vocab.codec_layout.uses_side_codes else None
        loss_mask = np.concatenate(self._targets)
        if loss == "everything":
            loss_mask[1:] = True
        return Document(ids, loss_mask, codes)

    def _add(self, ids: np.ndarray, codes: np.ndarray | None, target: bool) -> None:
        if codes is None:
            codes = np.full((len(ids), self.vocab.num_codebooks), NO_CODE, dtype=np.int64)
        self._ids.append(ids)
        self._codes.append(codes)
        self._targets.append(np.full(len(ids), target))
