"""Tokenized audio by utterance id, for the spoken turns of conversations.

Shape letters: C codebooks, F codec frames. Codes are ``[F, C]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_most.data.preparation.chat_files import Chat
from megatron_most.data.storage.codes import CodesDataset
from megatron_most.errors import DataError


class Recordings:
    """A container of utterance ids that also returns the first ``num_codebooks`` codes of each frame."""

    def __init__(self, sources: Sequence[CodesDataset], num_codebooks: int) -> None:
        self._num_codebooks = num_codebooks
        self._place_of = {
            identity: (source, index) for source in sources for index, identity in enumerate(source.ids())
        }
        self._set_aside = {identity for source in sources for identity in source.set_aside()}

    def __contains__(self, identity: object) -> bool:
        return identity in self._place_of

    def codes_of(self, identity: str) -> np.ndarray:
        """``codes [F, C]`` int64 of one utterance."""
        source, index = self._place_of[identity]
        return source.codes_of(index)[:, : self._num_codebooks]

    def num_unusable(self, chat: Chat, where: str) -> int:
        """How many turns name a recording that is in quarantine or was cut into chunks.

        Args:
            where: what an error calls this conversation.

        Raises:
            DataError: a turn names an utterance that was never tokenized.
        """
        missing = [
            message.audio for message in chat.messages() if message.audio is not None and message.audio not in self
        ]
        for identity in missing:
            if identity not in self._set_aside:
                raise DataError(f"{where}: utterance {identity!r} is in none of the codes")
        return len(missing)
