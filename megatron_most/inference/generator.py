"""Autoregressive generation with a key-value cache.

Shape letters: b prompts, s prompt positions, k cached positions, C codebooks, F codec frames, V ids.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from megatron_most.errors import ConfigError
from megatron_most.inference.decoder import Decoder
from megatron_most.inference.grammar import Grammar, speech_grammar, text_grammar
from megatron_most.inference.past import NativePast, Past
from megatron_most.inference.sampling import Sampling
from megatron_most.model import MoSTModel
from megatron_most.vocab import NO_CODE, VocabLayout

_END_TESTED_EVERY = 16
"""After so many new positions, check whether all rows have ended. The host waits for the device for it."""

_POSITIONS_MULTIPLE = 64
"""Divides the length of the cache: kernels need aligned masks, and prompts of similar lengths share a graph."""


class Prompt(Protocol):
    """The beginning of a document: ``ids [s]`` and, in the ``frame`` layouts, ``side_codes [s, C]``."""

    @property
    def ids(self) -> np.ndarray: ...

    @property
    def side_codes(self) -> np.ndarray | None: ...


@dataclass(frozen=True)
class Row:
    """What follows a prompt: ``ids [n]`` and ``codes [n, C]``, without the id that ends it.

    is_ended: False: it was cut off at its limit.
    """

    ids: np.ndarray
    codes: np.ndarray
    is_ended: bool

    @classmethod
    def until(cls, ends: Sequence[int], ids: np.ndarray, codes: np.ndarray) -> Row:
        """Up to the first of ``ends``."""
        found = np.flatnonzero(np.isin(ids, ends))
        length = int(found[0]) if found.size else len(ids)
        return cls(ids[:length], codes[:length], bool(found.size))

    @classmethod
    def nothing(cls, num_codebooks: int) -> Row:
        return cls(np.zeros(0, np.int64), np.zeros((0, num_codebooks), np.int64), False)


class Generator:
    """Continues prompts with text or speech, and predicts the positions of whole documents.

    Under tensor and expert parallelism all ranks that hold the model together must call it with the same arguments, and
    all get the result. Sequence parallelism must be off (``build_model(..., for_inference=True)``).

    Args:
        cuda_graph: on a GPU, capture a step as a CUDA graph and replay it. The graph and the key-value cache stay in
            memory and are reused for the next batch with the same number of prompts.
    """

    def __init__(self, model: MoSTModel, cuda_graph: bool = True) -> None:
        self.model = model.eval()
        self._prepare(model.vocab, next(model.parameters()).device, model.max_sequence_length)
        self._uses_graphs = cuda_graph and self.device.type == "cuda"

    def _prepare(self, vocab: VocabLayout, device: torch.device, max_positions: int) -> None:
        self.vocab, self.device, self.max_positions = vocab, device, max_positions
        self._uses_graphs = False
        self._decoder: Decoder | None = None
        # Cached because tables of long audio take time to build, and because a CUDA graph refers to their memory.
        self.grammar = functools.lru_cache(maxsize=8)(lambda build, *arguments: build(vocab, *arguments).to(device))

    @torch.inference_mode()
    def logits(
        self, ids: torch.Tensor, codes: torch.Tensor, is_padding: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits ``[b, s, V]`` of the id after each position; in the ``frame`` layouts, ``[b, s, C, K]`` of its codes.

        Args:
            ids, codes: ``[b, s]`` and ``[b, s, C]``, padded on the right.
            is_padding: ``[b, s]`` bool.
        """
        ids, codes, is_padding = (tensor.to(self.device) for tensor in (ids, codes, is_padding))
        visible = codes if self.vocab.codec_layout.uses_side_codes else None
        return self.model(ids, self.vocab.modality_of(ids), is_padding, codes=visible)

    def text(
        self,
        prompts: Sequence[Prompt],
        end: int | Sequence[int],
        max_new: int | Sequence[int],
        sampling: Sampling,
        *,
        num_text_ids: int | None = None,
        forbidden: tuple[int, ...] = (),
    ) -> list[list[int]]:
        """Text ids for each prompt, without ``end``.

        Args:
            end: the id that ends a text, or several of which any does.
            max_new: the maximum number of ids for all prompts, or for each of them.
            num_text_ids: the tokenizer's number of ids, if the model has more. None allows all text ids of the model.
            forbidden: text ids that are never generated.

        Raises:
            ConfigError: a prompt and its ``max_new`` exceed the positions of the model.
        """
        limits = [max_new] * len(prompts) if isinstance(max_new, int) else list(max_new)
        ends = (end,) if isinstance(end, int) else tuple(end)
        grammar = self.grammar(text_grammar, num_text_ids or self.vocab.text_vocab_size, ends, tuple(forbidden))
        return [row.ids.tolist() for row in self.rows(prompts, grammar, limits, sampling)]

    def speech(self, prompts: Sequence[Prompt], max_frames: int, sampling: Sampling) -> list[np.ndarray]:
        """Codes ``[F, C]``, at most ``max_frames`` frames, for each prompt; prompts end in ``begin_of_audio``.

        Raises:
            ConfigError: a prompt and ``max_frames`` exceed the positions of the model.
        """
        layout = self.vocab.codec_layout
        limits = [layout.num_positions(max_frames)] * len(prompts)
        rows = self.rows(prompts, self.grammar(speech_grammar, max_frames), limits, sampling)
        return [layout.decode(row.ids, row.codes) for row in rows]

    def rows(self, prompts: Sequence[Prompt], grammar: Grammar, limits: Sequence[int], sampling: Sampling) -> list[Row]:
        """What ``grammar`` lets follow each prompt, at most ``limits`` positions, without the id that ends it.

        Raises:
            ConfigError: a prompt and its limit exceed the positions of the model.
        """
        self.require_room(prompts, limits)
        blocks = list(self.positions(prompts, grammar, max(limits, default=0), sampling))
        if not blocks:
            return [Row.nothing(self.vocab.num_codebooks)] * len(prompts)
        ids, codes = (np.concatenate(pieces, axis=1) for pieces in zip(*blocks, strict=True))
        # Positions are relative, so a short prompt may go past the context that a longer one beside it fills.
        cut = zip(ids, codes, limits, strict=True)
        return [Row.until(grammar.ends, row[:limit], row_codes[:limit]) for row, row_codes, limit in cut]

    def require_room(self, prompts: Sequence[Prompt], limits: Sequence[int]) -> None:
        """Raise :class:`ConfigError` if a prompt and its limit exceed the positions of the model."""
        longest, max_new = max(
            ((len(prompt.ids), limit) for prompt, limit in zip(prompts, limits, strict=True)), key=sum
        )
        if longest + max_new > self.max_positions:
            raise ConfigError(
                f"a prompt of {longest} positions and {max_new} new ones exceed the model's {self.max_positions}"
            )

    @torch.inference_mode()
    def positions(
        self,
        prompts: Sequence[Prompt],
        grammar: Grammar,
        max_new: int,
        sampling: Sampling,
        every: int | None = None,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Generated ids ``[b, n]`` and codes ``[b, n, C]`` as they come, until all rows have ended or ``max_new``.

        A row that has ended repeats an end of ``grammar``.

        Args:
            every: at most so many positions at a time. The host waits for the device for each.
        """
        every = every or _END_TESTED_EVERY
        if max_new < 1:
            return
        ids, codes, is_padding = (tensor.to(self.device) for tensor in left_padded(prompts, self.vocab))
        start = ids.shape[1]
        # By prompt, so that what stands beside it in a batch does not change what is drawn for it.
        random = [sampling.generator(self.device, np.asarray(prompt.ids).tobytes()) for prompt in prompts]
        decoder = self._decoder_for(grammar, sampling, len(prompts), start + max_new)
        # Whoever asks for something else before this has ended gets a decoder of their own.
        self._decoder = None
        decoder.start(ids, codes, is_padding, random)
        num_new, num_given = 1, 0
        while True:
            is_last = num_new == max_new or (num_new % every == 0 and decoder.all_done())
            if is_last and self._uses_graphs:
                self._decoder = decoder
            if is_last or num_new % every == 0:
                yield decoder.chosen(slice(start + num_given, start + num_new))
                num_given = num_new
            if is_last:
                return
            decoder.advance(random)
            num_new += 1

    def _decoder_for(self, grammar: Grammar, sampling: Sampling, num_rows: int, num_positions: int) -> Decoder:
        """The previous decoder if it can be reused, else a new one."""
        if self._decoder is not None and self._decoder.fits(grammar, sampling, num_rows, num_positions):
            return self._decoder
        self._decoder = None  # frees its memory first
        num_positions = -(-num_positions // _POSITIONS_MULTIPLE) * _POSITIONS_MULTIPLE
        past = self._past(grammar.ids, num_rows, num_positions)
        return Decoder(past, self.vocab, grammar, sampling, num_rows, num_positions, self._uses_graphs)

    def _past(self, logit_ids: range, num_rows: int, num_positions: int) -> Past:
        return NativePast(self.model, logit_ids, num_rows, num_positions)


def left_padded(prompts: Sequence[Prompt], vocab: VocabLayout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``ids [b, s]``, ``codes [b, s, C]`` and ``is_padding [b, s]``, on the host.

    Rotary embeddings depend only on differences of positions, so left padding does not change any result.
    """
    longest = max(len(prompt.ids) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    codes = torch.full((len(prompts), longest, vocab.num_codebooks), NO_CODE)
    is_padding = torch.ones(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        start = longest - len(prompt.ids)
        ids[row, start:] = torch.from_numpy(np.asarray(prompt.ids, dtype=np.int64))
        if (side_codes := prompt.side_codes) is not None:
            codes[row, start:] = torch.from_numpy(np.asarray(side_codes, dtype=np.int64))
        is_padding[row, start:] = False
    return ids, codes, is_padding
