"""Assembles the documents of the templates.

Shape letters: n positions of a document, C codebooks, F codec frames. Codes are ``[F, C]``.
"""

from __future__ import annotations

import numpy as np

from megatron_most.data.storage.documents import Document
from megatron_most.errors import DataError
from megatron_most.text import TextTokenizer
from megatron_most.vocab import VocabLayout

LOSSES = ("targets", "everything")
"""Which ids carry loss: the template's targets, or every id after the first."""


class DocumentBuilder:
    """Collects the pieces of a document in order; a piece added with ``target=True`` carries loss.

    Args:
        where: what an error calls this document.
    """

    def __init__(self, vocab: VocabLayout, tokenizer: TextTokenizer, where: str) -> None:
        self.vocab, self.tokenizer, self.where = vocab, tokenizer, where
        self._length = 0
        self._ids: list[np.ndarray] = []
        self._coded: list[np.ndarray] = []
        self._codes: list[np.ndarray] = []
        self._targets: list[np.ndarray] = []

    def id(self, token: int, *, target: bool = False) -> None:
        self._add(np.array([token], dtype=np.int64), target)

    def text(self, text: str | None, before: str = "", *, target: bool = False) -> None:
        """``before``, then the stripped text; :class:`DataError` if that is empty."""
        stripped = (text or "").strip()
        if not stripped:
            raise DataError(f"{self.where}: text is empty")
        self.text_ids(np.array(self.tokenizer.encode(before + stripped), dtype=np.int64), target=target)

    def text_ids(self, ids: np.ndarray, *, target: bool = False) -> None:
        if ids.size and ids.max() >= self.vocab.text_vocab_size:
            raise DataError(
                f"{self.where}: text id {ids.max()} is outside the layout's {self.vocab.text_vocab_size} text ids"
            )
        self._add(ids, target)

    def frames(self, codes: np.ndarray | None, *, target: bool = False, goes_on: bool = False) -> None:
        """Codes ``[F, C]``; :class:`DataError` if there is no frame or a code is outside its codebook.

        ``goes_on``: more frames are to follow in the same audio.
        """
        if codes is None or len(codes) == 0:
            raise DataError(f"{self.where}: needs audio of at least one codec frame")
        self.vocab.check_codes(codes, self.where)
        layout = self.vocab.codec_layout
        ids, side_codes = layout.encode_open(codes) if goes_on else layout.encode(codes)
        if layout.uses_side_codes:
            self._coded.append(np.arange(self._length, self._length + len(ids)))
            self._codes.append(side_codes)
        self._add(ids, target)

    def audio(self, codes: np.ndarray | None, *, target: bool = False) -> None:
        """:meth:`frames` between their begin and end marks."""
        self.id(self.vocab.begin_of_audio, target=target)
        self.frames(codes, target=target)
        self.id(self.vocab.end_of_audio, target=target)

    def document(self, loss: str = "targets") -> Document:
        """The document so far; ``loss`` is one of :data:`LOSSES`."""
        loss_mask = np.concatenate(self._targets)
        if loss == "everything":
            loss_mask[1:] = True
        document = Document(np.concatenate(self._ids), loss_mask)
        if self.vocab.codec_layout.uses_side_codes:
            no_codes = np.empty((0, self.vocab.num_codebooks), dtype=np.int64)
            document.coded = np.concatenate([no_codes[:, 0], *self._coded])
            document.codes = np.concatenate([no_codes, *self._codes])
        return document

    def _add(self, ids: np.ndarray, target: bool) -> None:
        self._ids.append(ids)
        self._targets.append(np.full(len(ids), target))
        self._length += len(ids)
