"""Autoregressive generation with a key-value cache: each new token costs one position, not the past again.

Shape letters: b prompts, s prompt positions, k cached positions, C codebooks, F codec frames, V ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from megatron.core.inference.contexts import StaticInferenceContext

from megatron_most.errors import ConfigError
from megatron_most.inference.grammar import Grammar, SpeechGrammar, TextGrammar
from megatron_most.inference.sampling import Sampling
from megatron_most.model import MoSTModel
from megatron_most.vocab import NO_CODE


class Prompt(Protocol):
    """A document prefix: ``ids [s]`` and, in the ``frame`` layouts, ``side_codes [s, C]``."""

    @property
    def ids(self) -> np.ndarray: ...

    @property
    def side_codes(self) -> np.ndarray | None: ...


class Generator:
    """Continues prompts with text or speech. The model must be whole on this process (no model parallelism)."""

    def __init__(self, model: MoSTModel) -> None:
        self.model = model.eval()
        self.vocab = model.vocab
        self.device = next(model.parameters()).device

    def text(
        self,
        prompts: Sequence[Prompt],
        end: int,
        max_new: int,
        sampling: Sampling,
        *,
        num_text_ids: int | None = None,
        forbidden: tuple[int, ...] = (),
    ) -> list[list[int]]:
        """Text ids for each prompt, without ``end``; at most ``max_new`` of them.

        Args:
            num_text_ids: the tokenizer's ids, where the model has more; None allows all text ids of the model.
            forbidden: text ids that are never chosen.
        """
        grammar = TextGrammar(self.vocab, num_text_ids or self.vocab.text_vocab_size, end, forbidden)
        ids, _ = self._continue(prompts, grammar, max_new, sampling)
        return [row.tolist() for row in ids]

    def speech(self, prompts: Sequence[Prompt], max_frames: int, sampling: Sampling) -> list[np.ndarray]:
        """Codes ``[F, C]`` for each prompt that ends in ``begin_of_audio``; at most ``max_frames`` frames."""
        layout = self.vocab.codec_layout
        max_new = layout.num_positions(max_frames)
        ids, codes = self._continue(prompts, SpeechGrammar(self.vocab, max_frames), max_new, sampling)
        return [layout.decode(row, row_codes) for row, row_codes in zip(ids, codes, strict=True)]

    @torch.inference_mode()
    def _continue(
        self, prompts: Sequence[Prompt], grammar: Grammar, max_new: int, sampling: Sampling
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Generated ids ``[n]`` and codes ``[n, C]`` of each prompt, up to its end."""
        ids, codes, is_padding = self._left_padded(prompts)
        longest = ids.shape[1] + max_new
        if longest > self.model.max_sequence_length:
            raise ConfigError(
                f"prompt of {ids.shape[1]} and {max_new} new positions exceed the model's"
                f" {self.model.max_sequence_length}"
            )
        context = StaticInferenceContext(max_batch_size=len(prompts), max_sequence_length=longest)
        random = sampling.generator(self.device)
        key_is_padding = torch.zeros(len(prompts), longest, dtype=torch.bool, device=self.device)
        key_is_padding[:, : ids.shape[1]] = is_padding
        is_done = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        length = torch.full((len(prompts),), max_new, device=self.device)
        new_ids = torch.empty(len(prompts), max_new, dtype=torch.long, device=self.device)
        new_codes = []
        for position in range(max_new):
            logits, code_logits = self._step(ids, codes, is_padding, key_is_padding, context)
            allowed = grammar.allowed(new_ids[:, :position], logits.shape[-1])
            chosen = sampling.choose(logits.masked_fill(~allowed, float("-inf")), random)
            length[(chosen == grammar.end) & ~is_done] = position
            is_done |= chosen == grammar.end
            if is_done.all():
                break
            new_ids[:, position] = chosen
            next_codes = self._next_codes(new_ids[:, : position + 1], code_logits, sampling, random)
            new_codes.append(next_codes)
            ids, codes, is_padding = chosen[:, None], next_codes[:, None], is_done[:, None]
        if not new_codes:
            nothing = np.zeros((0, self.vocab.num_codebooks), np.int64)
            return [np.zeros(0, np.int64)] * len(prompts), [nothing] * len(prompts)
        all_ids, all_codes = new_ids.cpu().numpy(), torch.stack(new_codes, 1).cpu().numpy()
        ends = length.tolist()
        return (
            [row[:end] for row, end in zip(all_ids, ends, strict=True)],
            [row[:end] for row, end in zip(all_codes, ends, strict=True)],
        )

    def _step(
        self,
        ids: torch.Tensor,
        codes: torch.Tensor,
        is_padding: torch.Tensor,
        key_is_padding: torch.Tensor,
        context: StaticInferenceContext,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run new positions ``[b, s]`` through the model and the cache -> logits ``[b, V]``, codes' ``[b, C, K]``."""
        start, num_queries = context.sequence_len_offset, ids.shape[1]
        num_keys = start + num_queries
        query = torch.arange(start, num_keys, device=self.device)
        key = torch.arange(num_keys, device=self.device)
        # A padding query sees itself: softmax over nothing would be NaN and spread through the values.
        forbidden = key_is_padding[:, None, None, :num_keys] & (query[:, None] != key[None, :])
        logits, code_logits = self.model(
            ids,
            self.vocab.modality_of(ids),
            is_padding,
            codes=codes,
            attention_mask=forbidden,
            inference_context=context,
        )
        context.sequence_len_offset += num_queries
        return logits[:, -1], None if code_logits is None else code_logits[:, -1]

    def _next_codes(
        self, generated: torch.Tensor, code_logits: torch.Tensor | None, sampling: Sampling, random: torch.Generator
    ) -> torch.Tensor:
        """Codes ``[b, C]`` of the newest of the positions ``[b, n]``; ``NO_CODE`` where it has none."""
        nothing = torch.full((generated.shape[0], self.vocab.num_codebooks), NO_CODE, device=self.device)
        if code_logits is None:
            return nothing
        codes = sampling.choose(code_logits[..., : self.vocab.codebook_size], random)
        layout = self.vocab.codec_layout
        num_frames = layout.is_leading(generated).sum(1)[:, None]
        codebooks = torch.arange(self.vocab.num_codebooks, device=self.device)
        has_code = layout.has_code(generated.shape[1] - 1, num_frames, codebooks)
        return torch.where(layout.holds_side_codes(generated[:, -1:]) & has_code, codes, nothing)

    def _left_padded(self, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Prompts as ``ids [b, s]``, ``codes [b, s, C]`` and ``is_padding [b, s]``, all ending at the same position.

        Rotary embeddings see differences of positions only, so padding on the left changes no result.
        """
        longest = max(len(prompt.ids) for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        codes = torch.full((len(prompts), longest, self.vocab.num_codebooks), NO_CODE)
        is_padding = torch.ones(len(prompts), longest, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            start = longest - len(prompt.ids)
            ids[row, start:] = torch.from_numpy(np.asarray(prompt.ids, dtype=np.int64))
            if (side_codes := prompt.side_codes) is not None:
                codes[row, start:] = torch.from_numpy(np.asarray(side_codes, dtype=np.int64))
            is_padding[row, start:] = False
        return ids.to(self.device), codes.to(self.device), is_padding.to(self.device)
