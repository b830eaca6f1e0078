"""What a document of each task looks like, for training and as a prompt for generation.

Shape letters: n positions of a document, C codebooks, F codec frames.

    asr      <bos> "Transcribe:" <begin_of_audio> frames <end_of_audio>  text <eos>
    tts  <bos> "Say: text" <begin_of_audio>  frames <end_of_audio> <eos>
    text_lm  <bos>  text <eos>

The loss is on what stands after the double space. Text is kept as given, without white space at its ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_most.errors import DataError
from megatron_most.text import TextTokenizer
from megatron_most.vocab import NO_CODE, VocabLayout

TASKS = ("asr", "tts", "text_lm")
"""A task's index is its id in batches and metrics."""

TEMPLATE_VERSION = "1"
"""Raise it when a template changes: datasets of different versions do not mix."""

ASR_INSTRUCTION = "Transcribe:"
TTS_INSTRUCTION = "Say:"
INSTRUCTIONS = (ASR_INSTRUCTION, TTS_INSTRUCTION)
"""Text that templates add, for tokenizers to be trained on."""


@dataclass
class Document:
    """One training example.

    ids: ``[n]`` int64.
    loss_mask: ``[n]`` bool, whether the id is something the model is to predict.
    codes: ``[n, C]`` int64, ``NO_CODE`` where the id is not ``frame``; None in the ``flat`` layout.
    """

    ids: np.ndarray
    loss_mask: np.ndarray
    codes: np.ndarray | None

    def __len__(self) -> int:
        return len(self.ids)


def make_document(
    task: str,
    vocab: VocabLayout,
    tokenizer: TextTokenizer,
    *,
    text: str,
    codes: np.ndarray | None = None,
    where: str = "document",
) -> Document:
    """The training document of one utterance or text.

    Args:
        codes: ``[C, F]``, needed by ``asr`` and ``tts`` and refused by ``text_lm``.
        where: what errors call this document.

    Raises:
        DataError: empty text, codes that are missing, empty or outside the layout, text ids beyond the text vocabulary.
    """
    prefix_text = text if task == "tts" else None
    prefix_codes = codes if task == "asr" else None
    prefix = prompt(task, vocab, tokenizer, text=prefix_text, codes=prefix_codes, where=where)
    target = _Pieces(vocab, tokenizer, where)
    if task == "tts":
        target.frames(codes)
        target.id(vocab.end_of_audio)
    else:
        target.text(text)
        if task == "text_lm" and codes is not None:
            raise DataError(f"{where}: text_lm takes no codes")
    target.id(tokenizer.eos_id)
    answer = target.document(is_target=True)
    return Document(
        np.concatenate((prefix.ids, answer.ids)),
        np.concatenate((prefix.loss_mask, answer.loss_mask)),
        None if prefix.codes is None else np.concatenate((prefix.codes, answer.codes)),
    )


def prompt(
    task: str,
    vocab: VocabLayout,
    tokenizer: TextTokenizer,
    text: str | None = None,
    codes: np.ndarray | None = None,
    where: str = "prompt",
) -> Document:
    """What a model reads before it answers: exactly the part of a training document that carries no loss.

    ``asr`` needs ``codes [C, F]``, ``tts`` needs ``text``, ``text_lm`` may be given the ``text`` to continue.
    """
    pieces = _Pieces(vocab, tokenizer, where)
    pieces.id(tokenizer.bos_id)
    if task == "asr":
        pieces.text(ASR_INSTRUCTION)
        pieces.id(vocab.begin_of_audio)
        pieces.frames(codes)
        pieces.id(vocab.end_of_audio)
    elif task == "tts":
        pieces.text(_stripped(text, where), before=TTS_INSTRUCTION + " ")
        pieces.id(vocab.begin_of_audio)
    elif task == "text_lm":
        if text is not None:
            pieces.text(text)
    else:
        raise DataError(f"{where}: unknown task {task!r}; must be one of {', '.join(TASKS)}")
    return pieces.document(is_target=False)


class _Pieces:
    """Collects the parts of a document in order."""

    def __init__(self, vocab: VocabLayout, tokenizer: TextTokenizer, where: str) -> None:
        self._vocab, self._tokenizer, self._where = vocab, tokenizer, where
        self._ids: list[np.ndarray] = []
        self._codes: list[np.ndarray] = []

    def id(self, token_id: int) -> None:
        self._add(np.array([token_id], dtype=np.int64))

    def text(self, text: str | None, before: str = "") -> None:
        ids = np.array(self._tokenizer.encode(before + _stripped(text, self._where)), dtype=np.int64)
        if ids.size and ids.max() >= self._vocab.text_vocab_size:
            raise DataError(
                f"{self._where}: text id {ids.max()} is outside the layout's {self._vocab.text_vocab_size} text ids"
            )
        self._add(ids)

    def frames(self, codes: np.ndarray | None) -> None:
        if codes is None or codes.shape[-1] == 0:
            raise DataError(f"{self._where}: needs audio of at least one codec frame")
        self._vocab.check_codes(codes, self._where)
        self._add(*self._vocab.codec_layout.encode(codes))

    def _add(self, ids: np.ndarray, codes: np.ndarray | None = None) -> None:
        if codes is None:
            codes = np.full((len(ids), self._vocab.num_codebooks), NO_CODE, dtype=np.int64)
        self._ids.append(ids)
        self._codes.append(codes)

    def document(self, *, is_target: bool) -> Document:
        ids = np.concatenate(self._ids)
        codes = np.concatenate(self._codes) if self._vocab.codec_layout.uses_side_codes else None
        return Document(ids, np.full(len(ids), is_target), codes)


def _stripped(text: str | None, where: str) -> str:
    stripped = (text or "").strip()
    if not stripped:
        raise DataError(f"{where}: text is empty")
    return stripped
