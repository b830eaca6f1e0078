"""Speech recognition and synthesis."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_most.data.building.tasks import prompt
from megatron_most.inference.loading import LoadedModel
from megatron_most.inference.sampling import Sampling


def transcribe(
    model: LoadedModel,
    codes: Sequence[np.ndarray],
    max_new: int,
    sampling: Sampling | None = None,
    batch_size: int = 32,
) -> list[str]:
    """The text of each utterance, given as codec codes ``[F, C]``; at most ``max_new`` text ids each."""
    tokenizer, vocab = model.tokenizer, model.config.vocab
    prompts = [prompt("asr", vocab, tokenizer, codes=utterance) for utterance in codes]
    markers = (tokenizer.bos_id, tokenizer.pad_id)
    texts: list[str] = [""] * len(prompts)
    for batch in _batches_of_similar_length([len(item.ids) for item in prompts], batch_size):
        generated = model.generator.text(
            [prompts[index] for index in batch],
            [tokenizer.eos_id, *model.stop_ids],
            max_new,
            sampling or Sampling(),
            num_text_ids=tokenizer.vocab_size,
            forbidden=markers,
        )
        for index, ids in zip(batch, generated, strict=True):
            texts[index] = tokenizer.decode(ids)
    return texts


def speak(
    model: LoadedModel,
    texts: Sequence[str],
    max_seconds: float,
    sampling: Sampling | None = None,
    batch_size: int = 32,
) -> list[np.ndarray]:
    """Codec codes ``[F, C]`` of each text as speech; ``model.codec.decode`` turns them into audio."""
    vocab = model.config.vocab
    prompts = [prompt("tts", vocab, model.tokenizer, text=text) for text in texts]
    max_frames = max(1, int(max_seconds * model.codec.frame_rate))
    spoken: list[np.ndarray] = [np.zeros(0)] * len(prompts)
    for batch in _batches_of_similar_length([len(item.ids) for item in prompts], batch_size):
        generated = model.generator.speech([prompts[index] for index in batch], max_frames, sampling or Sampling())
        for index, codes in zip(batch, generated, strict=True):
            spoken[index] = codes
    return spoken


def _batches_of_similar_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of indices, longest first: little padding, and if memory does not suffice, the first batch fails."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
