"""What may come next: text stays text until its end token; audio stays whole frames in codebook order."""

from __future__ import annotations

from typing import Protocol

import torch

from megatron_most.vocab import Modality, VocabLayout


class Grammar(Protocol):
    """The ids allowed at each generated position."""

    end: int
    """The id that ends the generated segment; it is not part of the result."""

    def allowed(self, position: int, num_ids: int, device: torch.device) -> torch.Tensor:
        """``[num_ids]`` bool: ids allowed at ``position``, counted from the first generated one."""


class TextGrammar:
    """Text, ended by ``end``; ``forbidden`` are the tokenizer's markers that never stand inside text.

    num_text_ids: the tokenizer's; the model may have more, which no tokenizer could turn into text.
    """

    def __init__(self, vocab: VocabLayout, num_text_ids: int, end: int, forbidden: tuple[int, ...] = ()) -> None:
        self.vocab = vocab
        self.num_text_ids = num_text_ids
        self.end = end
        self.forbidden = [marker for marker in forbidden if marker != end]

    def allowed(self, position: int, num_ids: int, device: torch.device) -> torch.Tensor:
        ids = torch.arange(num_ids, device=device)
        allowed = (ids < self.num_text_ids) & (self.vocab.modality_of(ids) == Modality.TEXT)
        allowed[self.forbidden] = False
        return allowed


class SpeechGrammar:
    """Codec positions as the layout orders them, at least one frame, ended by ``end_of_audio``."""

    def __init__(self, vocab: VocabLayout) -> None:
        self.layout = vocab.codec_layout
        self.end = vocab.end_of_audio

    def allowed(self, position: int, num_ids: int, device: torch.device) -> torch.Tensor:
        ids, may_end = self.layout.allowed_next(position)
        allowed = torch.zeros(num_ids, dtype=torch.bool, device=device)
        allowed[ids.start : ids.stop] = True
        allowed[self.end] = may_end and position > 0
        return allowed
