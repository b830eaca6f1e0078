"""What a model has read of a batch of prompts, and how it reads more.

Shape letters: b rows, s prompt positions, k positions of the cache, C codebooks, K codes, V ids that are asked for.
"""

from __future__ import annotations

from typing import Protocol

import torch

from megatron_most.model import KeyValueCache, MoSTModel

Logits = tuple[torch.Tensor, torch.Tensor | None]
"""``[b, 1, V]`` of the id that follows, and in the ``frame`` layouts ``[b, 1, C, K]`` of its codes, else None."""


class Past(Protocol):
    """The keys and values of a batch, whose rows have the same number of positions, padding included."""

    position: torch.Tensor
    """``[1]`` int64: the next position."""

    def read_prompt(self, ids: torch.Tensor, codes: torch.Tensor, is_padding: torch.Tensor) -> Logits:
        """Forget everything and read prompts ``[b, s]``, padded on the left, with codes ``[b, s, C]``."""
        ...

    def read_next(self, ids: torch.Tensor, codes: torch.Tensor | None, is_padding: torch.Tensor) -> Logits:
        """Read one position more: ``ids [b, 1]``, ``codes [b, 1, C]``, ``is_padding [b, 1]``."""
        ...


class NativePast:
    """The past of a :class:`MoSTModel`, in memory of fixed shapes: a CUDA graph can repeat :meth:`read_next`.

    Args:
        logit_ids: the ids that are asked for.
        num_positions: the most positions of prompt and continuation together.
    """

    def __init__(self, model: MoSTModel, logit_ids: range, num_rows: int, num_positions: int) -> None:
        self._model, self._logit_ids = model, logit_ids
        self._cache = KeyValueCache(num_rows, num_positions)
        weight = next(model.parameters())
        self.position = torch.zeros(1, dtype=torch.long, device=weight.device)
        self._bias = torch.zeros(num_rows, 1, 1, num_positions, dtype=weight.dtype, device=weight.device)

    def read_prompt(self, ids: torch.Tensor, codes: torch.Tensor, is_padding: torch.Tensor) -> Logits:
        length = ids.shape[1]
        self._cache.start_prompt()
        self.position.fill_(length)
        self._bias.fill_(float("-inf"))
        self._bias[:, 0, 0, :length].masked_fill_(~is_padding, 0.0)
        at = torch.arange(length, device=ids.device)
        # A padding query attends to itself: softmax over no keys is NaN, which would spread through the values.
        forbidden = is_padding[:, None, None] & (at[:, None] != at)
        logits = self._read(ids, codes, is_padding, forbidden)
        self._cache.start_decoding(self.position)
        return logits

    def read_next(self, ids: torch.Tensor, codes: torch.Tensor | None, is_padding: torch.Tensor) -> Logits:
        self._bias.index_fill_(-1, self.position, 0.0)
        logits = self._read(ids, codes, is_padding, self._bias)
        self.position += 1
        return logits

    def _read(
        self, ids: torch.Tensor, codes: torch.Tensor | None, is_padding: torch.Tensor, mask: torch.Tensor
    ) -> Logits:
        return self._model(
            ids,
            self._model.vocab.modality_of(ids),
            is_padding,
            codes=codes,
            attention_mask=mask,
            inference_context=self._cache,
            logit_ids=self._logit_ids,
        )
