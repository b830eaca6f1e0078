"""Greedy generation written down plainly: the whole past is read again for every position, and no table is used."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megatron_most.vocab import NO_CODE


class Greedy:
    """What may follow is asked of the layout, position by position.

    Args:
        words, ends: text ids that may be written, and those that end an answer.
        begins: where audio may begin: ``never``, ``first`` or ``anywhere`` in text.
    """

    def __init__(
        self,
        generator: Any,
        words: set[int],
        ends: set[int],
        begins: str = "never",
        max_new: int = 1000,
        max_frames: int = 1000,
        penalty: float = 1.0,
    ) -> None:
        self.model, self.vocab = generator.model, generator.vocab
        self.words, self.ends, self.begins = words, ends, begins
        self.max_new, self.max_frames, self.penalty = max_new, max_frames, penalty

    def run(self, prompt: Any, num_before: int | None, limit: int) -> tuple[list[int], list[list[int]], bool]:
        """Ids, codes, and whether an end was reached. ``num_before``: frames of the audio that the prompt ends in."""
        vocab, layout = self.vocab, self.vocab.codec_layout
        ids = prompt.ids.tolist()
        side = np.full((len(ids), vocab.num_codebooks), NO_CODE) if prompt.side_codes is None else prompt.side_codes
        codes, start = side.tolist(), len(ids)
        in_audio, frames, length, count = num_before is not None, num_before or 0, 0, 0
        position = 0 if not num_before else len(layout.encode_open(np.zeros((num_before, vocab.num_codebooks), int))[0])
        while len(ids) < start + limit:
            logits, code_logits = self._read(ids, codes)
            if in_audio:
                run, may_end = layout.allowed_next(position, frames)
                full = frames == (num_before or 0) + self.max_frames
                allowed = {one for one in run if not (full and one in layout.leading_ids)}
                allowed |= {vocab.end_of_audio} if may_end else set()
            elif length < 0:
                allowed = set(self.ends)
            else:
                allowed = (self.words if length < self.max_new else set()) | self.ends
                first = self.begins == "first" and count == 0
                allowed |= {vocab.begin_of_audio} if first or self.begins == "anywhere" else set()
            chosen = max(sorted(allowed), key=lambda one: self._penalized(logits, ids, one))
            if chosen in self.ends and not in_audio:
                return ids[start:], codes[start:], True
            if chosen == vocab.end_of_audio and self.begins == "never":
                return ids[start:], codes[start:], True
            beside = [NO_CODE] * vocab.num_codebooks
            if chosen == vocab.begin_of_audio:
                in_audio, frames, position, num_before = True, 0, 0, None
            elif chosen == vocab.end_of_audio:
                in_audio, length = False, 0 if self.begins == "anywhere" else -1
            elif in_audio:
                frames += chosen in layout.leading_ids
                if code_logits is not None and chosen in layout.side_code_ids:
                    best = code_logits[:, : vocab.codebook_size].argmax(-1).tolist()
                    has = layout.has_code(position, frames, np.arange(vocab.num_codebooks))
                    beside = [code if one else NO_CODE for code, one in zip(best, has, strict=True)]
                position += 1
            else:
                length += 1
            count += 1
            ids.append(chosen)
            codes.append(beside)
        return ids[start:], codes[start:], False

    def _penalized(self, logits: torch.Tensor, ids: list[int], one: int) -> float:
        value = float(logits[one])
        if self.penalty != 1 and one < self.vocab.text_vocab_size and one in ids:
            return value / self.penalty if value > 0 else value * self.penalty
        return value

    def _read(self, ids: list[int], codes: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        row = torch.tensor(ids)[None]
        with torch.no_grad():
            logits, code_logits = self.model(
                row,
                self.vocab.modality_of(row),
                torch.zeros_like(row, dtype=torch.bool),
                codes=torch.tensor(codes)[None],
            )
        return logits[0, -1], None if code_logits is None else code_logits[0, -1]
