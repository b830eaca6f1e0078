"""Documents longer than a row: reject them, cut them anywhere (chunk), or cut them between parts (split)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
"""The policies of each task: a transcript cannot be cut where its audio is cut, and audio has no parts to split at."""

_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+|\n+")


@dataclass(frozen=True)
class LengthLimit:
    """At most ``positions`` input positions per document, counted like ``data.seq_length``; None for no limit."""

    positions: int | None = None
    policy: str = "reject"

    def check(self, task: str) -> None:
        """Raise :class:`ConfigError` if ``task`` does not have the policy, or the policy lacks a limit."""
        if self.policy not in POLICIES[task]:
            raise ConfigError(f"over_length={self.policy!r}: must be {' or '.join(POLICIES[task])} for task={task}")
        if self.positions is None and self.policy != "reject":
            raise ConfigError(f"over_length={self.policy!r}: needs max_length")

    def fits(self, document: Document) -> bool:
        return self.positions is None or len(document) - 1 <= self.positions

    def split[Part](
        self, parts: Sequence[Part], make: Callable[[Sequence[Part]], Document]
    ) -> tuple[list[Document], list[Part]]:
        """Documents of consecutive ``parts``, as few as possible, and the parts that are too long by themselves."""
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

    def _longest[Part](
        self, parts: Sequence[Part], make: Callable[[Sequence[Part]], Document]
    ) -> tuple[Document | None, int]:
        """The document of the most leading ``parts`` that fit, and their number, found by galloping search."""
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
    """``text`` cut after each sentence and line; the pieces join to ``text``."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    pieces = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]
    return [piece for piece in pieces if piece]
