"""One request that stands alone: a transcript, speech, or what comes next, piece by piece.

Shape letters: T samples.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np

from megatron_most.data.building.tasks import continuation_prompt, prompt
from megatron_most.errors import DataError
from megatron_most.inference.answers import Answer, Piece, stream
from megatron_most.inference.loading import LoadedModel
from megatron_most.inference.sampling import Decoding


def respond(
    model: LoadedModel,
    task: str,
    pieces: Sequence[str | np.ndarray],
    form: str = "written",
    decoding: Decoding | None = None,
) -> Generator[Piece, None, Answer]:
    """The pieces of the answer to a request as they come; returns the whole answer.

    Args:
        task: ``asr``, whose one piece is a recording; ``tts``, whose one piece is a text; or ``continue``.
        pieces: texts, and waveforms ``[T]`` at the codec's sample rate.
        form: of what ``continue`` continues with, one of :data:`~megatron_most.inference.FORMS`. With ``either``, text
            and audio may follow each other.

    Raises:
        DataError: ``asr`` gets no recording, or ``tts`` no text.
        ConfigError: the request leaves no room for an answer in the model's context.
    """
    assert task in ("asr", "tts", "continue"), task
    if task == "asr":
        if len(pieces) != 1 or isinstance(pieces[0], str):
            raise DataError("asr: needs one recording")
        document = prompt("asr", model.config.vocab, model.tokenizer, codes=model.codec.encode(pieces[0]))
        return stream(model, document, "written", decoding)
    if task == "tts":
        if len(pieces) != 1 or not isinstance(pieces[0], str) or not pieces[0].strip():
            raise DataError("tts: needs one text")
        document = prompt("tts", model.config.vocab, model.tokenizer, text=pieces[0])
        return stream(model, document, "spoken", decoding)
    segments = [one if isinstance(one, str) else model.codec.encode(one) for one in pieces]
    document = continuation_prompt(model.config.vocab, model.tokenizer, segments, spoken=form == "spoken")
    return stream(model, document, form, decoding, alternates=True)
