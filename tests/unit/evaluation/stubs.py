"""Models that need no weights: one that guesses, one that knows, and what they have of a real one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_most.data.storage.documents import Document
from megatron_most.evaluation.interface import Generated
from megatron_most.evaluation.likelihood import Likelihood
from megatron_most.inference import Decoding
from tests.unit.data.tiny import LetterTokenizer, LoudnessCodec, layout

WORDS = ["<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz ,.'", "the", "fox", "dog", "and"]


class StubModel:
    """Its likelihoods are ``likelihood(document)`` per position; its answers ``answer(prompt)``."""

    def __init__(
        self,
        likelihood: Callable[[Document], float] | None = None,
        answer: Callable[[Document], str | np.ndarray] | None = None,
        context: int = 4096,
        tokenizer: Any = None,
    ) -> None:
        self.vocab, self.tokenizer, self.codec, self.context = (
            layout(),
            tokenizer or LetterTokenizer(),
            LoudnessCodec(),
            context,
        )
        self._likelihood, self._answer = likelihood, answer
        self.description = {"name": "stub"}
        self.asked: list[int] = []

    def loglikelihood(self, documents: Sequence[Document]) -> list[Likelihood]:
        self.asked.append(len(documents))
        found = []
        for document in documents:
            each = np.full(int(document.loss_mask.sum()), self._likelihood(document))
            found.append(Likelihood(each - 1, each, False))
        return found

    def generate(self, prompts: Sequence[Document], decoding: Decoding, *, speech: bool = False) -> list[Generated]:
        self.asked.append(len(prompts))
        answers = [self._answer(one) for one in prompts]
        return [Generated(codes=one) if speech else Generated(text=one) for one in answers]


def guess(document: Document) -> float:
    """Looks random, and is the same for the same document."""
    digest = hashlib.sha256(document.ids.tobytes() + (document.codes.tobytes() if document.codes is not None else b""))
    return -1 - int.from_bytes(digest.digest()[:6], "little") / (1 << 48)


def knows_loudness(document: Document) -> float:
    """Prefers the louder recording: what a test writes as the correct one."""
    return -10.0 if document.codes is None or not len(document.codes) else -10.0 + float(document.codes[:, 0].mean())


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Single letters, a few words, and special tokens: all ids that the model has."""
    model = tokenizers.models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>")
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("the|fox|dog|and|."), "isolated")
    inner.add_special_tokens(["<s>", "</s>"])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.save_pretrained(folder)
    return made
