"""A chat with a model, of spoken and written turns.

Shape letters: C codebooks, F codec frames, T samples.
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np

from megatron_most.data.building.tasks import ChatTurn, make_chat
from megatron_most.data.storage.documents import Document
from megatron_most.errors import DataError
from megatron_most.inference.answers import Answer, Piece, stream
from megatron_most.inference.loading import LoadedModel
from megatron_most.inference.sampling import Decoding

_LEAST_ROOM = 0.25
"""Share of the context that an answer finds free, if forgetting the oldest exchanges can make it so."""


class Conversation:
    """What was said so far: an optional system message, then turns of the user and answers of the model.

    ``turns`` are those that the model sees, and ``num_forgotten`` counts the exchanges that no longer fit.
    """

    def __init__(self, model: LoadedModel, system: str | None = None) -> None:
        self.model = model
        self.turns = [ChatTurn("system", system)] if system else []
        self._num_fixed = len(self.turns)
        self.num_forgotten = 0

    def say(self, turn: str | np.ndarray) -> None:
        """The user's next turn: a text, or a waveform ``[T]`` at the codec's sample rate.

        Raises:
            DataError: the text is empty, or the sound too short for the codec.
        """
        if isinstance(turn, str):
            if not turn.strip():
                raise DataError("the user's turn: text is empty")
            said = ChatTurn("user", turn)
        else:
            said = ChatTurn("user", "", self.model.codec.encode(turn)[:, : self.model.config.vocab.num_codebooks])
        if self.turns and self.turns[-1].role == "user":
            self.turns.pop()  # was never answered
        self.turns.append(said)

    def answer(self, form: str = "written", decoding: Decoding | None = None) -> Generator[Piece, None, Answer]:
        """The pieces of the model's answer as they come; returns the whole answer.

        What was answered to the end becomes part of the conversation. An empty answer takes its question with it.

        Args:
            form: ``written``, ``spoken``, or ``either``: the model chooses, and is not told in which form to answer.

        Raises:
            ConfigError: the system message and the last turn leave no room for an answer.
        """
        assert self.turns and self.turns[-1].role == "user", "there is something to answer"
        answer = yield from stream(self.model, self._prompt(form), form, decoding)
        if answer.codes is not None and len(answer.codes):
            self.turns.append(ChatTurn("assistant", "", answer.codes))
        elif answer.text.strip():
            self.turns.append(ChatTurn("assistant", answer.text))
        else:
            self.turns.pop()
        return answer

    def _prompt(self, form: str) -> Document:
        most = int(self.model.config.data.seq_length * (1 - _LEAST_ROOM))
        while True:
            document = make_chat(
                self.model.config.vocab, self.model.tokenizer, self.turns, where="conversation", answer=form
            )
            if len(document) <= most or len(self.turns) <= self._num_fixed + 1:
                return document
            del self.turns[self._num_fixed : self._num_fixed + 2]
            self.num_forgotten += 1
