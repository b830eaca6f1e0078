"""Autoregressive generation with a key-value cache.

Shape letters: b prompts, s prompt positions, k cached positions, C codebooks, F codec frames, V ids.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from megatron_most.errors import ConfigError
from megatron_most.inference.decoder import Decoder
from megatron_most.inference.grammar import Grammar, speech_grammar, text_grammar
from megatron_most.inference.sampling import Sampling
from megatron_most.model import MoSTModel
from megatron_most.vocab import NO_CODE, VocabLayout

_END_TESTED_EVERY = 16
"""After so many new positions, check whether all rows have ended. The host waits for the device for it."""


class Prompt(Protocol):
    """The beginning of a document: ``ids [s]`` and, in the ``frame`` layouts, ``side_codes [s, C]``."""

    @property
    def ids(self) -> np.ndarray: ...

    @property
    def side_codes(self) -> np.ndarray | None: ...


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
        self.vocab = model.vocab
        self.device = next(model.parameters()).device
        self._uses_graphs = cuda_graph and self.device.type == "cuda"
        self._decoder: Decoder | None = None
        # Cached because tables of long audio take time to build, and because a CUDA graph refers to their memory.
        vocab, device = self.vocab, self.device
        self._grammar = functools.lru_cache(maxsize=8)(lambda build, *arguments: build(vocab, *arguments).to(device))

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
        self._require_room(prompts, limits)
        ends = (end,) if isinstance(end, int) else tuple(end)
        grammar = self._grammar(text_grammar, num_text_ids or self.vocab.text_vocab_size, ends, tuple(forbidden))
        # Positions are relative, so a short prompt may go past the context that a longer one beside it fills.
        ids, _ = self._continue(prompts, grammar, max(limits), sampling)
        return [row[:limit].tolist() for row, limit in zip(ids, limits, strict=True)]

    def speech(self, prompts: Sequence[Prompt], max_frames: int, sampling: Sampling) -> list[np.ndarray]:
        """Codes ``[F, C]``, at most ``max_frames`` frames, for each prompt; prompts end in ``begin_of_audio``.

        Raises:
            ConfigError: a prompt and ``max_frames`` exceed the positions of the model.
        """
        layout = self.vocab.codec_layout
        max_new = layout.num_positions(max_frames)
        self._require_room(prompts, [max_new] * len(prompts))
        ids, codes = self._continue(prompts, self._grammar(speech_grammar, max_frames), max_new, sampling)
        return [layout.decode(row, row_codes) for row, row_codes in zip(ids, codes, strict=True)]

    def _require_room(self, prompts: Sequence[Prompt], limits: Sequence[int]) -> None:
        longest, max_new = max(
            ((len(prompt.ids), limit) for prompt, limit in zip(prompts, limits, strict=True)), key=sum
        )
        if longest + max_new > self.model.max_sequence_length:
            raise ConfigError(
                f"a prompt of {longest} positions and {max_new} new ones exceed the model's"
                f" {self.model.max_sequence_length}"
            )

    @torch.inference_mode()
    def _continue(
        self, prompts: Sequence[Prompt], grammar: Grammar, max_new: int, sampling: Sampling
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Generated ids ``[n]`` and codes ``[n, C]`` for each prompt, without the end id."""
        if max_new < 1:
            nothing = np.zeros((0, self.vocab.num_codebooks), np.int64)
            return [np.zeros(0, np.int64)] * len(prompts), [nothing] * len(prompts)
        ids, codes, is_padding = (tensor.to(self.device) for tensor in left_padded(prompts, self.vocab))
        start = ids.shape[1]
        decoder = self._decoder_for(grammar, sampling, len(prompts), start + max_new)
        # By prompt, so that what stands beside it in a batch does not change what is drawn for it.
        random = [sampling.generator(self.device, np.asarray(prompt.ids).tobytes()) for prompt in prompts]
        decoder.start(ids, codes, is_padding, random)
        num_new = 1
        while num_new < max_new and not (num_new % _END_TESTED_EVERY == 0 and decoder.all_done()):
            decoder.advance(random)
            num_new += 1
        new = slice(start, start + num_new)
        all_ids = decoder.ids[:, new].cpu().numpy()
        if decoder.codes is None:
            all_codes = np.full((*all_ids.shape, self.vocab.num_codebooks), NO_CODE)
        else:
            all_codes = decoder.codes[:, new].cpu().numpy()
        lengths = [int(np.append(np.isin(row, grammar.ends), True).argmax()) for row in all_ids]
        return (
            [row[:length] for row, length in zip(all_ids, lengths, strict=True)],
            [row[:length] for row, length in zip(all_codes, lengths, strict=True)],
        )

    def _decoder_for(self, grammar: Grammar, sampling: Sampling, num_rows: int, num_positions: int) -> Decoder:
        """The previous decoder if it can be reused, else a new one."""
        if self._decoder is not None and self._decoder.fits(grammar, sampling, num_rows, num_positions):
            return self._decoder
        self._decoder = None  # frees its memory first
        decoder = Decoder(self.model, grammar, sampling, num_rows, num_positions, self._uses_graphs)
        self._decoder = decoder if self._uses_graphs else None
        return decoder


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
