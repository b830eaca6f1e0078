"""Speech recognition and synthesis."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from megatron_most.data.building.tasks import prompt
from megatron_most.inference.answers import Answer, answer
from megatron_most.inference.loading import LoadedModel
from megatron_most.inference.sampling import Decoding, Sampling


def transcribe(
    model: LoadedModel,
    codes: Sequence[np.ndarray],
    max_new: int | None = None,
    sampling: Sampling | None = None,
    batch_size: int = 32,
    on_limit: Callable[[int], None] | None = None,
) -> list[str]:
    """The text of each utterance, given as codec codes ``[F, C]``.

    An utterance does not change the text of another, except by rounding.

    Args:
        max_new: the maximum number of text ids of an answer. The model's context always bounds it.
        on_limit: called with the index of each utterance whose answer reached its limit and may lack its end.

    Raises:
        ConfigError: an utterance leaves no room for an answer in the model's context.
    """
    prompts = [prompt("asr", model.config.vocab, model.tokenizer, codes=utterance) for utterance in codes]
    decoding = Decoding(max_new=max_new, sampling=sampling or Sampling())
    answers = answer(model, prompts, "written", decoding, batch_size=batch_size)
    _tell_limits(answers, on_limit)
    return [one.text for one in answers]


def speak(
    model: LoadedModel,
    texts: Sequence[str],
    max_seconds: float | None = None,
    sampling: Sampling | None = None,
    batch_size: int = 32,
    on_limit: Callable[[int], None] | None = None,
) -> list[np.ndarray]:
    """Codec codes ``[F, C]`` of each text as speech; ``model.codec.decode`` turns them into audio.

    A text does not change the speech of another, except by rounding.

    Args:
        max_seconds: the maximum length of the speech for a text. The model's context always bounds it.
        on_limit: called with the index of each text whose speech reached its limit and may lack its end.

    Raises:
        ConfigError: a text leaves no room for a frame in the model's context.
    """
    prompts = [prompt("tts", model.config.vocab, model.tokenizer, text=text) for text in texts]
    decoding = Decoding(max_seconds=max_seconds, sampling=sampling or Sampling())
    answers = answer(model, prompts, "spoken", decoding, batch_size=batch_size)
    _tell_limits(answers, on_limit)
    return [one.codes for one in answers if one.codes is not None]


def _tell_limits(answers: Sequence[Answer], on_limit: Callable[[int], None] | None) -> None:
    for index, one in enumerate(answers):
        if on_limit is not None and one.at_limit:
            on_limit(index)
