"""Inputs -> the documents of a task: one example after the other, with the template options and the length limit.

Shape letters: C codebooks, F codec frames. Codes are ``[F, C]``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_most.data.building.chat_modes import MODES, check_modes, choose_mode
from megatron_most.data.building.document_builder import LOSSES, DocumentBuilder
from megatron_most.data.building.instructions import choose_instruction
from megatron_most.data.building.interleave import alternate, groups
from megatron_most.data.building.length_limit import LengthLimit, sentences
from megatron_most.data.building.recordings import Recordings
from megatron_most.data.building.tasks import ChatTurn, make_chat, make_document, make_interleaved
from megatron_most.data.preparation.chat_files import Chat, Message, read_chats
from megatron_most.data.preparation.manifest import manifest_records
from megatron_most.data.storage.codes import CodesDataset, Utterance
from megatron_most.data.storage.documents import Document
from megatron_most.errors import ConfigError, DataError
from megatron_most.text import TextTokenizer
from megatron_most.vocab import VocabLayout


@dataclass(frozen=True)
class TemplateOptions:
    """How documents are made.

    Args:
        wordings: how many wordings of each instruction are used.
        loss: ``targets`` or ``everything``.
        limit: the longest document, and what becomes of longer ones.
        modes: what exchanges of a chat may be, in equal shares.
    """

    wordings: int = 1
    loss: str = "targets"
    limit: LengthLimit = field(default_factory=LengthLimit)
    modes: Sequence[str] = MODES

    def __post_init__(self) -> None:
        if self.wordings < 1:
            raise ConfigError(f"wordings={self.wordings}: must be at least 1")
        if self.loss not in LOSSES:
            raise ConfigError(f"loss={self.loss!r}: must be one of {', '.join(LOSSES)}")
        check_modes(self.modes)


class Examples:
    """Iterates over the documents of ``task``; a source may be read more than once, so it counts anew each time.

    Attributes:
        counts: ``examples`` read; ``rejected``: examples, or parts of them, that are too long; ``cut``: examples that
            became several documents; ``textless``: utterances whose text a task needs and nobody gave; for chat
            ``unspoken``: conversations with an exchange that no mode allows, ``unrecorded``: turns whose recording
            could not be tokenized (in quarantine, or in chunks), and one count for each mode.
        licenses: for each manifest of texts and chat file, examples of each license; ``unknown`` where nobody says.
    """

    def __init__(
        self,
        task: str,
        vocab: VocabLayout,
        tokenizer: TextTokenizer,
        options: TemplateOptions,
        *,
        codes: Sequence[CodesDataset] = (),
        texts: Sequence[str | Path] = (),
        chats: Sequence[str | Path] = (),
    ) -> None:
        options.limit.check(task)
        self._task, self._vocab, self._tokenizer, self._options = task, vocab, tokenizer, options
        self._codes, self._texts, self._chats = codes, texts, chats
        self.counts: Counter[str] = Counter()
        self.licenses: dict[str, Counter[str]] = {}

    def __iter__(self) -> Iterator[Document]:
        makers = {"interleaved": self._interleaved, "chat": self._conversations, "text_lm": self._texts_alone}
        self.counts = Counter(examples=0, rejected=0, cut=0)
        self.licenses = {str(path): Counter() for path in (*self._texts, *self._chats)}
        for documents in makers.get(self._task, self._utterances)():
            self.counts["examples"] += 1
            self.counts["cut"] += len(documents) > 1
            yield from documents

    def _utterances(self) -> Iterator[list[Document]]:
        for source in self._codes:
            for utterance in source:
                yield self._utterance(utterance, f"codes {source.prefix}, {utterance.id}")

    def _utterance(self, utterance: Utterance, where: str) -> list[Document]:
        task, options = self._task, self._options
        codes = utterance.codes[:, : self._vocab.num_codebooks]
        if task == "speech_lm":
            return self._limited(self._speech_chunks(codes, where))
        if not utterance.text:
            self.counts["textless"] += 1
            return []
        document = make_document(
            task,
            self._vocab,
            self._tokenizer,
            text=utterance.text,
            codes=codes,
            where=where,
            instruction=choose_instruction(task, utterance.id, options.wordings),
            loss=options.loss,
        )
        return self._limited([document])

    def _speech_chunks(self, codes: np.ndarray, where: str) -> list[Document]:
        """The whole, or under the policy ``chunk`` chunks of about equal length."""

        def make(part: np.ndarray) -> Document:
            return make_document(
                "speech_lm", self._vocab, self._tokenizer, codes=part, where=where, loss=self._options.loss
            )

        document, limit = make(codes), self._options.limit
        if limit.fits(document) or limit.policy == "reject":
            return [document]
        parts = 2
        while not limit.fits(make(codes[: -(-len(codes) // parts)])):
            parts += 1
            if parts > len(codes):
                return [document]
        return [make(part) for part in np.array_split(codes, parts)]

    def _texts_alone(self) -> Iterator[list[Document]]:
        for source in self._codes:
            for utterance in source:
                self.counts["textless"] += not utterance.text
                where = f"codes {source.prefix}, {utterance.id}"
                yield self._of_text(utterance.text, where) if utterance.text else []
        for manifest in self._texts:
            for record in manifest_records(manifest, needs_audio=False):
                self.licenses[str(manifest)][record.license or "unknown"] += 1
                yield self._of_text(record.text, f"{manifest}, {record.id}")

    def _of_text(self, text: str, where: str) -> list[Document]:
        def make(parts: Sequence[str]) -> Document:
            text = "".join(parts)
            return make_document("text_lm", self._vocab, self._tokenizer, text=text, where=where, loss=options.loss)

        options, limit = self._options, self._options.limit
        whole = make([text])
        if limit.fits(whole) or limit.policy == "reject":
            return self._limited([whole])
        if limit.policy == "chunk":
            return self._text_chunks(whole)
        documents: list[Document] = []
        pieces = sentences(text)
        while pieces:
            # A sentence that alone is too long is chunked where it stands, so that documents keep the text's order.
            fitting = next((n for n, piece in enumerate(pieces) if not limit.fits(make([piece]))), len(pieces))
            documents += limit.split(pieces[:fitting], make)[0]
            documents += self._text_chunks(make(pieces[fitting : fitting + 1])) if fitting < len(pieces) else []
            pieces = pieces[fitting + 1 :]
        return documents

    def _text_chunks(self, document: Document) -> list[Document]:
        """``document`` in chunks that each begin with ``bos``; the last one has the end."""
        size = self._options.limit.positions  # and one id for bos, less one that is only a label
        chunks = []
        for start in range(1, len(document), size):
            builder = DocumentBuilder(self._vocab, self._tokenizer, "chunk")
            builder.id(self._tokenizer.bos_id)
            builder.text_ids(document.ids[start : start + size], target=True)
            chunks.append(builder.document(self._options.loss))
        return chunks

    def _interleaved(self) -> Iterator[list[Document]]:
        for source in self._codes:
            for name, utterances in groups(filter(lambda utterance: utterance.text, source)):
                segments = [
                    segment if isinstance(segment, str) else segment[:, : self._vocab.num_codebooks]
                    for segment in alternate(name, utterances)
                ]
                where = f"codes {source.prefix}, {name}"

                def make(parts: Sequence[str | np.ndarray], where: str = where) -> Document:
                    return make_interleaved(self._vocab, self._tokenizer, parts, where=where, loss=self._options.loss)

                yield self._split(segments, make)

    def _conversations(self) -> Iterator[list[Document]]:
        recordings = Recordings(self._codes, self._vocab.num_codebooks)
        for path in self._chats:
            for chat in read_chats(path):
                self.licenses[str(path)][chat.license or "unknown"] += 1
                yield self._conversation(chat, recordings, f"{path}, {chat.id}")

    def _conversation(self, chat: Chat, recordings: Recordings, where: str) -> list[Document]:
        try:
            self.counts["unrecorded"] += recordings.num_unusable(chat)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        modes = [choose_mode(chat, place, self._options.modes, recordings) for place in range(len(chat.exchanges))]
        if None in modes:
            self.counts["unspoken"] += 1
            return []
        self.counts.update(modes)
        exchanges = [_turns(pair, mode, recordings) for pair, mode in zip(chat.exchanges, modes, strict=True)]
        return self._split(exchanges, lambda parts: self._chat(chat, parts, where))

    def _chat(self, chat: Chat, exchanges: Iterable[list[ChatTurn]], where: str) -> Document:
        system = [ChatTurn("system", chat.system.content)] if chat.system else []
        turns = [*system, *(turn for exchange in exchanges for turn in exchange)]
        options = self._options
        return make_chat(
            self._vocab, self._tokenizer, turns, where=where, key=chat.id, wordings=options.wordings, loss=options.loss
        )

    def _split(self, parts: Sequence, make) -> list[Document]:
        whole, limit = make(parts), self._options.limit
        if limit.policy == "reject" or limit.fits(whole):
            return self._limited([whole])
        documents, too_long = limit.split(parts, make)
        self.counts["rejected"] += len(too_long)
        return documents

    def _limited(self, documents: list[Document]) -> list[Document]:
        """The documents that fit; the others are counted."""
        fitting = [document for document in documents if self._options.limit.fits(document)]
        self.counts["rejected"] += len(documents) - len(fitting)
        return fitting


def _turns(pair: tuple[Message, Message], mode: str, recordings: Recordings) -> list[ChatTurn]:
    """One exchange. ``mode`` says who speaks: ``S-T`` is a spoken question and a written answer."""
    turns = []
    for message, kind in zip(pair, mode.split("-"), strict=True):
        turns.append(
            ChatTurn(message.role, message.content, recordings.codes_of(message.audio) if kind == "S" else None)
        )
    return turns
