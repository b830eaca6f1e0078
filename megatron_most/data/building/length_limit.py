"""What becomes of a document that is longer than a row: rejected, chunked anywhere, or split where it may be."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from megatron_most.data.storage.documents import Document
from megatron_most.errors import ConfigError

POLICIES: dict[str, tuple[str, ...]] = {
    "asr": ("reject",),
    "tts": ("reject",),
    "text_lm": ("reject", "chunk", "split"),
    "speech_lm": ("reject", "chunk"),
    "interleaved": ("reject", "split"),
    "chat": ("reject", "split"),
}
"""What each task can do: a transcript cannot be cut where its audio is, and sound has no places to be split at."""

_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+|\n+")

Part = TypeVar("Part")


@dataclass(frozen=True)
class LengthLimit:
    """``positions``: input positions of a document, as ``data.seq_length`` counts them; None has no limit."""

    positions: int | None = None
    policy: str = "reject"

    def check(self, task: str) -> None:
        """Raise :class:`ConfigError` for a policy that ``task`` does not have, or one without a limit."""
        if self.policy not in POLICIES[task]:
            raise ConfigError(f"over_length={self.policy!r}: {task} can {' or '.join(POLICIES[task])}")
        if self.positions is None and self.policy != "reject":
            raise ConfigError(f"over_length={self.policy!r}: needs max_length")

    def fits(self, document: Document) -> bool:
        return self.positions is None or len(document) - 1 <= self.positions

    def split(
        self, parts: Sequence[Part], make: Callable[[Sequence[Part]], Document]
    ) -> tuple[list[Document], list[Part]]:
        """As few documents of consecutive ``parts`` as fit, and the parts that alone are too long."""
        documents: list[Document] = []
        too_long: list[Part] = []
        while parts:
            document, count = self._longest(parts, make)
            if document is None:
                too_long.append(parts[0])
            else:
                documents.append(document)
            parts = parts[max(count, 1) :]
        return documents, too_long

    def _longest(
        self, parts: Sequence[Part], make: Callable[[Sequence[Part]], Document]
    ) -> tuple[Document | None, int]:
        """The document of as many of the first ``parts`` as fit, and how many; it tries about twice as many at most."""
        longest, count, step, growing = None, 0, 1, True
        while step:
            tried = count + step
            if tried <= len(parts) and self.fits(document := make(parts[:tried])):
                longest, count = document, tried
            else:
                growing = False
            step = step * 2 if growing else step // 2
        return longest, count


def sentences(text: str) -> list[str]:
    """``text`` cut after the ends of sentences and lines; joined they give it back."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    pieces = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]
    return [piece for piece in pieces if piece]
