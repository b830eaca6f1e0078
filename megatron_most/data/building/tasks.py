"""What a document of each task looks like, for training and as a prompt for generation.

    asr          <bos> "Transcribe:" <begin_of_audio> frames <end_of_audio>  text <eos>
    tts          <bos> "Say: text" <begin_of_audio>  frames <end_of_audio> <eos>
    text_lm      <bos>  text <eos>
    speech_lm    <bos> <begin_of_audio>  frames <end_of_audio> <eos>
    interleaved  <bos>  text <begin_of_audio> frames <end_of_audio> text ... <eos>
    chat         <bos> <system> text (<user> turn <assistant>  turn <eos>)...

Shape letters: C codebooks, F codec frames. Codes are ``[F, C]``.

The loss is on what stands after the double space (in chat: up to and with the next ``<eos>``). Text is kept as given,
without white space at its ends. Instructions have several wordings (:mod:`megatron_most.data.building.instructions`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_most.data.building.document_builder import DocumentBuilder
from megatron_most.data.building.instructions import INSTRUCTIONS, choose_instruction
from megatron_most.data.building.special_tokens import special_tokens
from megatron_most.data.storage.documents import Document
from megatron_most.errors import DataError
from megatron_most.text import TextTokenizer
from megatron_most.vocab import VocabLayout

UTTERANCE_TASKS = ("asr", "tts", "text_lm", "speech_lm")
"""Tasks whose documents are one utterance or text each."""

TEMPLATE_VERSION = "1"
"""Raise it when a template changes: datasets of different versions do not mix."""


@dataclass
class ChatTurn:
    """What one side of a conversation says: spoken where there are ``codes [F, C]``, else written."""

    role: str
    text: str
    codes: np.ndarray | None = None


def make_document(
    task: str,
    vocab: VocabLayout,
    tokenizer: TextTokenizer,
    *,
    text: str | None = None,
    codes: np.ndarray | None = None,
    where: str = "document",
    instruction: str | None = None,
    loss: str = "targets",
) -> Document:
    """The training document of one utterance or text.

    Args:
        task: one of :data:`UTTERANCE_TASKS`.
        text: needed by all but ``speech_lm``.
        codes: ``[F, C]``, needed by all but ``text_lm``, which refuses them.
        where: what errors call this document.
        instruction: another wording than the first, for ``asr`` and ``tts``.
        loss: one of :data:`~megatron_most.data.building.document_builder.LOSSES`.

    Raises:
        DataError: empty text, codes that are missing, empty or outside the layout, text ids beyond the text vocabulary.
    """
    given_text = text if task == "tts" else None
    given_codes = codes if task == "asr" else None
    builder = _prompt(task, vocab, tokenizer, given_text, given_codes, where, instruction)
    if task in ("tts", "speech_lm"):
        builder.frames(codes, target=True)
        builder.id(vocab.end_of_audio, target=True)
    else:
        builder.text(text, target=True)
        if task == "text_lm" and codes is not None:
            raise DataError(f"{where}: text_lm takes no codes")
    builder.id(tokenizer.eos_id, target=True)
    return builder.document(loss)


def prompt(
    task: str,
    vocab: VocabLayout,
    tokenizer: TextTokenizer,
    text: str | None = None,
    codes: np.ndarray | None = None,
    where: str = "prompt",
    instruction: str | None = None,
) -> Document:
    """What a model reads before it answers: exactly the part of a training document that carries no loss.

    ``asr`` needs ``codes [F, C]``, ``tts`` needs ``text``; ``text_lm`` may be given the ``text`` to continue and
    ``speech_lm`` the ``codes``. Of a codec that has more codebooks than the layout, the first are taken.
    """
    if codes is not None:
        codes = codes[:, : vocab.num_codebooks]
    return _prompt(task, vocab, tokenizer, text, codes, where, instruction).document()


def _prompt(
    task: str,
    vocab: VocabLayout,
    tokenizer: TextTokenizer,
    text: str | None,
    codes: np.ndarray | None,
    where: str,
    instruction: str | None,
) -> DocumentBuilder:
    builder = DocumentBuilder(vocab, tokenizer, where)
    builder.id(tokenizer.bos_id)
    if task == "asr":
        builder.text(instruction or INSTRUCTIONS["asr"][0])
        builder.audio(codes)
    elif task == "tts":
        builder.text(text, before=f"{instruction or INSTRUCTIONS['tts'][0]} ")
        builder.id(vocab.begin_of_audio)
    elif task == "text_lm":
        if text is not None:
            builder.text(text)
    elif task == "speech_lm":
        builder.id(vocab.begin_of_audio)
        if codes is not None:
            builder.frames(codes)
    else:
        raise DataError(f"{where}: unknown task {task!r} of an utterance; must be one of {', '.join(UTTERANCE_TASKS)}")
    return builder


def make_interleaved(
    vocab: VocabLayout,
    tokenizer: TextTokenizer,
    segments: Sequence[str | np.ndarray],
    *,
    where: str = "document",
    loss: str = "targets",
) -> Document:
    """A document of written (text) and spoken (codes ``[F, C]``) segments of one whole, all of it to be predicted."""
    builder = DocumentBuilder(vocab, tokenizer, where)
    builder.id(tokenizer.bos_id)
    for segment in segments:
        if isinstance(segment, str):
            builder.text(segment, target=True)
        else:
            builder.audio(segment, target=True)
    builder.id(tokenizer.eos_id, target=True)
    return builder.document(loss)


def make_chat(
    vocab: VocabLayout,
    tokenizer: TextTokenizer,
    turns: Sequence[ChatTurn],
    *,
    where: str = "document",
    key: str = "",
    wordings: int = 1,
    loss: str = "targets",
    answer: str | None = None,
) -> Document:
    """A conversation: an optional ``system`` turn, then ``user`` and ``assistant`` turns in alternation.

    The answers of the assistant carry the loss, and what begins spoken ones too: the model learns to choose. Before a
    spoken answer, and before a written one to spoken words, the user says which is wanted.

    Args:
        key: chooses the wording of each instruction among the first ``wordings``.
        answer: ``spoken`` or ``written`` makes a prompt: ``turns`` end with the user's, and the document with what
            begins the answer that is wanted.
    """
    tokens = special_tokens(vocab, tokenizer, roles=True)
    builder = DocumentBuilder(vocab, tokenizer, where)
    builder.id(tokens["bos"])
    for place, turn in enumerate(turns):
        is_answer = turn.role == "assistant"
        builder.id(tokens[turn.role])
        instruction = None
        if turn.role == "user":
            following = turns[place + 1].codes is not None if place + 1 < len(turns) else answer == "spoken"
            if following or turn.codes is not None:
                purpose = "answer_spoken" if following else "answer_written"
                instruction = choose_instruction(purpose, f"{key}#{place}", wordings)
        if turn.codes is None:
            builder.text(turn.text if instruction is None else f"{turn.text.strip()}\n{instruction}", target=is_answer)
        else:
            builder.audio(turn.codes, target=is_answer)
            if instruction:
                builder.text(instruction)
        if is_answer:
            builder.id(tokens["eos"], target=True)
    if answer is not None:
        builder.id(tokens["assistant"])
        if answer == "spoken":
            builder.id(tokens["begin_of_audio"])
    return builder.document(loss)
