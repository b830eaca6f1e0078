"""What may come next: text stays text until its end token; audio stays whole frames in codebook order."""

from __future__ import annotations

from typing import Protocol

import torch

from megatron_most.vocab import Modality, VocabLayout


class Grammar(Protocol):
    """The ids allowed at each generated position."""

    end: int
    """The id that ends the generated segment; it is not part of the result."""

    def allowed(self, generated: torch.Tensor, num_ids: int) -> torch.Tensor:
        """``[b, num_ids]``, or ``[num_ids]`` for all rows alike, bool: ids allowed after ``generated [b, n]``."""


class TextGrammar:
    """Text, ended by ``end``; ``forbidden`` are the tokenizer's markers that never stand inside text.

    num_text_ids: the tokenizer's; the model may have more, which no tokenizer could turn into text.
    """

    def __init__(self, vocab: VocabLayout, num_text_ids: int, end: int, forbidden: tuple[int, ...] = ()) -> None:
        self.vocab = vocab
        self.num_text_ids = num_text_ids
        self.end = end
        self.forbidden = [marker for marker in forbidden if marker != end]

    def allowed(self, generated: torch.Tensor, num_ids: int) -> torch.Tensor:
        ids = torch.arange(num_ids, device=generated.device)
        allowed = (ids < self.num_text_ids) & (self.vocab.modality_of(ids) == Modality.TEXT)
        allowed[self.forbidden] = False
        return allowed


class SpeechGrammar:
    """Codec positions as the layout orders them, 1 to ``max_frames`` frames, ended by ``end_of_audio``."""

    def __init__(self, vocab: VocabLayout, max_frames: int) -> None:
        self.layout = vocab.codec_layout
        self.end = vocab.end_of_audio
        self.max_frames = max_frames

    def allowed(self, generated: torch.Tensor, num_ids: int) -> torch.Tensor:
        position = generated.shape[1]
        num_frames = self.layout.is_leading(generated).sum(1).tolist()
        masks = {count: self._after(position, count, num_ids) for count in set(num_frames)}
        return torch.stack([masks[count] for count in num_frames]).to(generated.device)

    def _after(self, position: int, num_frames: int, num_ids: int) -> torch.Tensor:
        ids, may_end = self.layout.allowed_next(position, num_frames)
        allowed = torch.zeros(num_ids, dtype=torch.bool)
        allowed[ids.start : ids.stop] = True
        if num_frames == self.max_frames:
            leading = self.layout.leading_ids
            allowed[leading.start : leading.stop] = False
        allowed[self.end] = may_end
        return allowed
