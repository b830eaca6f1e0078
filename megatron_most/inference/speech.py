"""Speech recognition and synthesis."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from megatron_most.data.building.tasks import prompt
from megatron_most.data.storage.documents import Document
from megatron_most.inference.loading import LoadedModel
from megatron_most.inference.sampling import Sampling


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
    return answer_in_text(model, prompts, max_new, sampling, batch_size, on_limit)


def answer_in_text(
    model: LoadedModel,
    prompts: Sequence[Document],
    max_new: int | None = None,
    sampling: Sampling | None = None,
    batch_size: int = 32,
    on_limit: Callable[[int], None] | None = None,
) -> list[str]:
    """The text that continues each prompt. Arguments and errors as for :func:`transcribe`."""
    tokenizer = model.tokenizer
    rooms = [max(1, model.config.data.seq_length - len(item.ids)) for item in prompts]
    limits = rooms if max_new is None else [min(max_new, room) for room in rooms]
    markers = (tokenizer.bos_id, tokenizer.pad_id)
    texts: list[str] = [""] * len(prompts)
    for batch in batches_of_similar_length([len(item.ids) for item in prompts], batch_size):
        generated = model.generator.text(
            [prompts[index] for index in batch],
            [tokenizer.eos_id, *model.stop_ids],
            [limits[index] for index in batch],
            sampling or Sampling(),
            num_text_ids=tokenizer.vocab_size,
            forbidden=markers,
        )
        for index, ids in zip(batch, generated, strict=True):
            texts[index] = tokenizer.decode(ids)
            if on_limit is not None and len(ids) == limits[index]:
                on_limit(index)
    return texts


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
    return answer_in_speech(model, prompts, max_seconds, sampling, batch_size, on_limit)


def answer_in_speech(
    model: LoadedModel,
    prompts: Sequence[Document],
    max_seconds: float | None = None,
    sampling: Sampling | None = None,
    batch_size: int = 32,
    on_limit: Callable[[int], None] | None = None,
) -> list[np.ndarray]:
    """Codes ``[F, C]`` of the speech after each prompt, which ends in ``begin_of_audio``; else as :func:`speak`."""
    lengths = [len(item.ids) for item in prompts]
    longest = None if max_seconds is None else max(1, int(max_seconds * model.codec.frame_rate))
    limits = [_most_frames(model, length, longest) for length in lengths]
    spoken: list[np.ndarray] = [np.zeros(0)] * len(prompts)
    # A limit is part of the grammar of a batch, which ends the last codebook of a delay pattern after it.
    for limit in sorted(set(limits)):
        alike = [index for index, mine in enumerate(limits) if mine == limit]
        for batch in batches_of_similar_length([lengths[index] for index in alike], batch_size):
            indices = [alike[place] for place in batch]
            generated = model.generator.speech([prompts[index] for index in indices], limit, sampling or Sampling())
            for index, codes in zip(indices, generated, strict=True):
                spoken[index] = codes
                if on_limit is not None and len(codes) == limit:
                    on_limit(index)
    return spoken


def _most_frames(model: LoadedModel, prompt_length: int, longest: int | None) -> int:
    """Frames that the context leaves after a prompt, at most ``longest`` and at least one."""
    layout, room = model.config.vocab.codec_layout, model.config.data.seq_length - prompt_length
    # Positions of a layout are linear in the frames.
    first = layout.num_positions(1)
    fitting = max(1, 1 + (room - first) // (layout.num_positions(2) - first))
    return fitting if longest is None else min(longest, fitting)


def batches_of_similar_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of indices, longest first: little padding, and if memory does not suffice, the first batch fails."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
