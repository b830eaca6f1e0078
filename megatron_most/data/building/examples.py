"""Inputs -> the documents of a task, within the length limit.

Shape letters: C codebooks, F codec frames. Codes are ``[F, C]``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_most.data.building.chat_modes import MODES, check_modes, choose_modes
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
from megatron_most.errors import ConfigError
from megatron_most.text import TextTokenizer
from megatron_most.vocab import VocabLayout


@dataclass(frozen=True)
class TemplateOptions:
    """How documents are made.

    Args:
        wordings: use the first ``wordings`` wordings of each instruction.
        loss: one of :data:`~megatron_most.data.building.document_builder.LOSSES`.
        limit: the maximum length, and what happens to longer documents.
        modes: the allowed modes of exchanges in a chat, drawn with equal probability.
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
    """Iterates over the documents of ``task``. Each iteration reads the sources and counts from the start.

    Attributes:
        counts: ``examples`` read; ``rejected``: examples, or parts of them, that are too long; ``cut``: examples that
            became several documents; ``textless``: utterances without the text that the task needs. For chat also
            ``unspoken``: conversations that have an exchange without an allowed mode; ``unrecorded``: turns whose
            recording is in quarantine or was cut into chunks; and the exchanges of each mode.
        licenses: for each text manifest and chat file, the number of examples under each license, or ``unknown``.
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
        makers = {"interleaved": self._interleaved, "chat": self._conversations, "text_lm": self._plain_texts}
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
        """One document, or chunks of nearly equal length if it is too long and the policy is ``chunk``."""

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

    def _plain_texts(self) -> Iterator[list[Document]]:
        for source in self._codes:
            for utterance in source:
                self.counts["textless"] += not utterance.text
                where = f"codes {source.prefix}, {utterance.id}"
                yield self._text(utterance.text, where) if utterance.text else []
        for manifest in self._texts:
            for record in manifest_records(manifest, needs_audio=False):
                self.licenses[str(manifest)][record.license or "unknown"] += 1
                yield self._text(record.text, f"{manifest}, {record.id}")

    def _text(self, text: str, where: str) -> list[Document]:
        limit, loss = self._options.limit, self._options.loss

        def make(parts: Sequence[str]) -> Document:
            text = "".join(parts)
            return make_document("text_lm", self._vocab, self._tokenizer, text=text, where=where, loss=loss)

        whole = make([text])
        if limit.fits(whole) or limit.policy == "reject":
            return self._limited([whole])
        if limit.policy == "chunk":
            return self._text_chunks(whole)
        documents: list[Document] = []
        pieces = sentences(text)
        while pieces:
            # A sentence that is too long by itself is chunked in its place, so that documents keep the text's order.
            fitting = next((n for n, piece in enumerate(pieces) if not limit.fits(make([piece]))), len(pieces))
            documents += limit.split(pieces[:fitting], make)[0]
            documents += self._text_chunks(make(pieces[fitting : fitting + 1])) if fitting < len(pieces) else []
            pieces = pieces[fitting + 1 :]
        return documents

    def _text_chunks(self, document: Document) -> list[Document]:
        """``document`` in chunks that begin with ``bos``; only the last one has ``eos``. All other ids carry loss."""
        size = self._options.limit.positions  # plus bos, minus the last id, which is only a label
        assert size is not None, "LengthLimit.check refuses chunks without a limit"
        chunks = []
        for start in range(1, len(document), size):
            builder = DocumentBuilder(self._vocab, self._tokenizer, "chunk")
            builder.id(self._tokenizer.bos_id)
            builder.text_ids(document.ids[start : start + size], target=True)
            chunks.append(builder.document())
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
        self.counts["unrecorded"] += recordings.num_unusable(chat, where)
        modes = choose_modes(chat, self._options.modes, recordings)
        if not modes:
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

    def _split[Part](self, parts: Sequence[Part], make: Callable[[Sequence[Part]], Document]) -> list[Document]:
        """One document of all ``parts``, or several if it is too long and the policy is ``split``."""
        whole, limit = make(parts), self._options.limit
        if limit.policy == "reject" or limit.fits(whole):
            return self._limited([whole])
        documents, too_long = limit.split(parts, make)
        self.counts["rejected"] += len(too_long)
        return documents

    def _limited(self, documents: list[Document]) -> list[Document]:
        """The documents that fit; the others are counted as rejected."""
        fitting = [document for document in documents if self._options.limit.fits(document)]
        self.counts["rejected"] += len(documents) - len(fitting)
        return fitting


def _turns(pair: tuple[Message, Message], mode: str, recordings: Recordings) -> list[ChatTurn]:
    """One exchange. ``mode`` says who speaks: ``S-T`` is a spoken question and a written answer."""
    turns = []
    for message, kind in zip(pair, mode.split("-"), strict=True):
        codes = None
        if kind == "S":
            assert message.audio is not None, "choose_modes allows S only with a recording"
            codes = recordings.codes_of(message.audio)
        turns.append(ChatTurn(message.role, message.content, codes))
    return turns
