"""The template of each task, for training documents and for prompts.

    asr          <bos> "Transcribe:" <begin_of_audio> frames <end_of_audio>  text <eos>
    tts          <bos> "Say: text" <begin_of_audio>  frames <end_of_audio> <eos>
    text_lm      <bos>  text <eos>
    speech_lm    <bos> <begin_of_audio>  frames <end_of_audio> <eos>
    interleaved  <bos>  text <begin_of_audio> frames <end_of_audio> text ... <eos>
    chat         <bos> <system> text (<user> turn <assistant>  turn <eos>)...

Shape letters: C codebooks, F codec frames. Codes are ``[F, C]``.

The ids after the double space carry loss (in chat, up to and including the next ``<eos>``). Text is stripped and
otherwise unchanged. Instructions have several wordings (:mod:`megatron_most.data.building.instructions`).
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
"""Tasks with one utterance or one text per document."""

TEMPLATE_VERSION = "1"
"""Increase it when a template changes: datasets of different versions cannot be mixed."""


@dataclass
class ChatTurn:
    """One turn of a conversation: spoken if it has ``codes [F, C]``, otherwise written."""

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
        text: required by all tasks but ``speech_lm``.
        codes: ``[F, C]``; required by all tasks but ``text_lm``, which refuses them.
        where: what an error calls this document.
        instruction: the wording, for ``asr`` and ``tts``; None for the first one.
        loss: one of :data:`~megatron_most.data.building.document_builder.LOSSES`.

    Raises:
        DataError: text is empty; codes are missing, empty or outside the layout; a text id is outside the vocabulary.
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
    """The prompt of a task: exactly the part of its training document that carries no loss.

    ``asr`` requires ``codes [F, C]`` and ``tts`` requires ``text``. ``text_lm`` continues ``text`` and ``speech_lm``
    continues ``codes``, if given. If the codec has more codebooks than the layout, the first ones are used.
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
            builder.frames(codes, goes_on=True)
    else:
        raise DataError(f"{where}: task={task!r}: must be one of {', '.join(UTTERANCE_TASKS)}")
    return builder


def make_interleaved(
    vocab: VocabLayout,
    tokenizer: TextTokenizer,
    segments: Sequence[str | np.ndarray],
    *,
    where: str = "document",
    loss: str = "targets",
) -> Document:
    """A document of text and audio (codes ``[F, C]``) segments; every id but the first is a target."""
    builder = DocumentBuilder(vocab, tokenizer, where)
    builder.id(tokenizer.bos_id)
    for segment in segments:
        if isinstance(segment, str):
            builder.text(segment, target=True)
        else:
            builder.audio(segment, target=True)
    builder.id(tokenizer.eos_id, target=True)
    return builder.document(loss)


def continuation_prompt(
    vocab: VocabLayout,
    tokenizer: TextTokenizer,
    segments: Sequence[str | np.ndarray],
    *,
    spoken: bool,
    where: str = "prompt",
) -> Document:
    """The beginning of an ``interleaved`` document of texts and audio (codes ``[F, C]``), to be continued.

    Args:
        spoken: the document ends inside audio: in its last segment if that is audio, else in a new one.
    """
    builder = DocumentBuilder(vocab, tokenizer, where)
    builder.id(tokenizer.bos_id)
    for place, segment in enumerate(segments):
        if isinstance(segment, str):
            builder.text(segment)
            continue
        codes = segment[:, : vocab.num_codebooks]
        if spoken and place == len(segments) - 1:
            builder.id(vocab.begin_of_audio)
            builder.frames(codes, goes_on=True)
        else:
            builder.audio(codes)
    if spoken and (not segments or isinstance(segments[-1], str)):
        builder.id(vocab.begin_of_audio)
    return builder.document()


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
    """A conversation: an optional ``system`` turn, then alternating ``user`` and ``assistant`` turns.

    The assistant's turns carry loss, including ``begin_of_audio``, so that the model learns whether to speak. If either
    turn of an exchange is spoken, the user's turn ends with an instruction to answer in speech or in writing.

    Args:
        key: determines the wording of each instruction, among the first ``wordings``.
        answer: ``spoken`` or ``written`` makes a prompt: ``turns`` end with the user's, and the document ends with the
            ids that begin the answer. With ``either`` the last turn has no instruction.
    """
    tokens = special_tokens(vocab, tokenizer, roles=True)
    builder = DocumentBuilder(vocab, tokenizer, where)
    builder.id(tokens["bos"])
    for place, turn in enumerate(turns):
        is_answer = turn.role == "assistant"
        builder.id(tokens[turn.role])
        instruction = None
        if turn.role == "user":
            is_last = place + 1 == len(turns)
            speaks_next = answer == "spoken" if is_last else turns[place + 1].codes is not None
            if (speaks_next or turn.codes is not None) and not (is_last and answer == "either"):
                purpose = "answer_spoken" if speaks_next else "answer_written"
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
