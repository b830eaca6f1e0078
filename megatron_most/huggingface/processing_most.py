"""Prompts and training examples: text and codec codes -> ids, side codes, masks and labels.

    asr   <bos> "Transcribe:" <begin_of_audio> frames <end_of_audio>  text <eos>
    tts   <bos> "Say: text" <begin_of_audio>  frames <end_of_audio> <eos>
    text  <bos>  text <eos>
    chat  <bos> <system> text (<user> turn <assistant>  turn <eos>)...

What stands after the double space is predicted; a prompt ends before it.

Shape letters: b rows, s positions, C codebooks, F codec frames. Codes are ``[F, C]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

from .codec_layout_most import NO_CODE, CodecLayout

NO_TARGET = -100
"""The label of a position that is not predicted."""


class MoSTProcessor(ProcessorMixin):
    """A tokenizer, and where audio goes between its texts.

    The codec is not part of it: audio comes and goes as codes of the codec that ``config.codec`` names.

    Args:
        tokenizer: of text.
        codec_layout, text_vocab_size, num_codebooks, codebook_size: as in :class:`MoSTConfig`.
        instructions: the wording for ``asr``, ``tts``, ``answer_spoken`` and ``answer_written``.
        role_ids: the id that begins a turn of each role; None for a model that knows no chat.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        codec_layout: str = "frame",
        text_vocab_size: int = 256,
        num_codebooks: int = 4,
        codebook_size: int = 64,
        instructions: dict[str, str] | None = None,
        role_ids: dict[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.codec_layout, self.text_vocab_size = codec_layout, text_vocab_size
        self.num_codebooks, self.codebook_size = num_codebooks, codebook_size
        self.instructions, self.role_ids = instructions or {}, role_ids
        self._layout = CodecLayout(codec_layout, text_vocab_size + 2, num_codebooks, codebook_size)
        super().__init__(tokenizer, **kwargs)

    def __call__(self, text: str | Sequence[str], **kwargs: Any) -> BatchFeature:
        """Prompts of text to go on with: ``<bos> text``."""
        texts = [text] if isinstance(text, str) else text
        return self.collate([self._document().text(entry).values() for entry in texts])

    def transcription_prompts(self, codes: Sequence[np.ndarray]) -> BatchFeature:
        """For the text of each utterance ``[F, C]``."""
        return self.collate([self._asr(entry).values() for entry in codes])

    def speech_prompts(self, texts: Sequence[str]) -> BatchFeature:
        """For the speech of each text."""
        return self.collate([self._tts(entry).values() for entry in texts])

    def chat_prompts(self, conversations: Sequence[Sequence[dict[str, Any]]], answer: str = "written") -> BatchFeature:
        """For the assistant's next turn of each conversation, ``written`` or ``spoken``.

        A turn is ``{"role", "content"}`` or ``{"role", "codes"}``; the last is the user's.
        """
        if answer not in ("written", "spoken"):
            raise ValueError(f"answer={answer!r}: must be written or spoken")
        return self.collate([self._chat(turns, answer).values() for turns in conversations])

    def example(self, task: str, text: str | None = None, codes: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """One training example: ``input_ids [s]``, ``labels [s]`` and, in the ``frame`` layouts, ``codes [s, C]``.

        Args:
            task: ``asr`` and ``tts`` need ``text`` and ``codes [F, C]``, ``text`` needs ``text``.
        """
        if task == "asr":
            document = self._asr(codes).text(text, is_target=True)
        elif task == "tts":
            document = self._tts(text).frames(codes, is_target=True).id(self.text_vocab_size + 1, is_target=True)
        elif task == "text":
            document = self._document().text(text, is_target=True)
        else:
            raise ValueError(f"task={task!r}: must be asr, tts or text")
        return document.id(self.tokenizer.eos_token_id, is_target=True).values(with_labels=True)

    def collate(self, documents: Sequence[dict[str, np.ndarray]]) -> BatchFeature:
        """Documents -> tensors ``[b, s]`` and ``[b, s, C]``, padded on the left."""
        longest = max(len(document["input_ids"]) for document in documents)
        fills = {"input_ids": 0, "labels": NO_TARGET, "codes": NO_CODE}
        batch: dict[str, torch.Tensor] = {}
        for name in documents[0]:
            shape = (len(documents), longest, *documents[0][name].shape[1:])
            batch[name] = torch.full(shape, fills[name], dtype=torch.long)
            for row, document in zip(batch[name], documents, strict=True):
                row[longest - len(document[name]) :] = torch.from_numpy(document[name])
        lengths = torch.tensor([len(document["input_ids"]) for document in documents])
        batch["attention_mask"] = (torch.arange(longest) >= longest - lengths[:, None]).long()
        return BatchFeature(batch)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        return self.tokenizer.batch_decode(*args, **kwargs)

    def _document(self) -> _Document:
        return _Document(self.tokenizer, self._layout, self.text_vocab_size).id(self.tokenizer.bos_token_id)

    def _asr(self, codes: np.ndarray | None) -> _Document:
        return self._document().text(self.instructions["asr"]).audio(codes)

    def _tts(self, text: str | None) -> _Document:
        return self._document().text(text, before=f"{self.instructions['tts']} ").id(self.text_vocab_size)

    def _chat(self, turns: Sequence[dict[str, Any]], answer: str) -> _Document:
        if self.role_ids is None:
            raise ValueError("role_ids=None: this model has no ids for the roles of a conversation")
        document = self._document()
        for place, turn in enumerate(turns):
            document.id(self.role_ids[turn["role"]])
            codes, instruction = turn.get("codes"), None
            if turn["role"] == "user":
                is_last = place + 1 == len(turns)
                is_spoken = answer == "spoken" if is_last else turns[place + 1].get("codes") is not None
                if is_spoken or codes is not None:
                    instruction = self.instructions["answer_spoken" if is_spoken else "answer_written"]
            if codes is None:
                text = turn["content"].strip()
                document.text(text if instruction is None else f"{text}\n{instruction}")
            else:
                document.audio(codes)
                if instruction is not None:
                    document.text(instruction)
            if turn["role"] == "assistant":
                document.id(self.tokenizer.eos_token_id)
        document.id(self.role_ids["assistant"])
        return document.id(self.text_vocab_size) if answer == "spoken" else document


class _Document:
    """Ids, side codes and targets, piece by piece."""

    def __init__(self, tokenizer: Any, layout: CodecLayout, begin_of_audio: int) -> None:
        self.tokenizer, self.layout, self.begin_of_audio = tokenizer, layout, begin_of_audio
        self._pieces: list[tuple[np.ndarray, np.ndarray, bool]] = []

    def id(self, id_: int, is_target: bool = False) -> _Document:
        return self._add(np.array([id_]), None, is_target)

    def text(self, text: str | None, before: str = "", is_target: bool = False) -> _Document:
        """Text without white space at its ends. What spells a special token stays text."""
        stripped = (text or "").strip()
        if not stripped:
            raise ValueError("text is empty")
        ids = self.tokenizer(before + stripped, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return self._add(np.array(ids), None, is_target)

    def frames(self, codes: np.ndarray | None, is_target: bool = False) -> _Document:
        if codes is None:
            raise ValueError("codes=None: the task needs codes [frames, codebooks]")
        return self._add(*self.layout.encode(codes), is_target)

    def audio(self, codes: np.ndarray | None) -> _Document:
        return self.id(self.begin_of_audio).frames(codes).id(self.begin_of_audio + 1)

    def values(self, with_labels: bool = False) -> dict[str, np.ndarray]:
        ids, side_codes, targets = zip(*self._pieces, strict=True)
        document = {"input_ids": np.concatenate(ids)}
        if self.layout.uses_side_codes:
            document["codes"] = np.concatenate(side_codes)
        if with_labels:
            is_target = np.repeat(targets, [len(piece) for piece in ids])
            document["labels"] = np.where(is_target, document["input_ids"], NO_TARGET)
        return document

    def _add(self, ids: np.ndarray, side_codes: np.ndarray | None, is_target: bool) -> _Document:
        if side_codes is None:
            side_codes = np.full((len(ids), self.layout.num_codebooks), NO_CODE)
        self._pieces.append((ids.astype(np.int64), side_codes, is_target))
        return self
