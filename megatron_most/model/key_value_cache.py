"""The keys and values of a generation's past, in tensors whose shape does not change from one position to the next.

Megatron's own context cuts the cache at the current position, which the host has to know: each position has shapes of
its own, and no CUDA graph can repeat it. Here the position is a tensor.

Shape letters: b rows, k positions of the cache, n heads, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext


class KeyValueCache(StaticInferenceContext):
    """A context for one prompt, whose positions are written from 0 on, and then for one position at a time.

    ``position`` is None while the prompt is read. Then it is a tensor ``[1]`` of int64: where the next keys and values
    are written, and the angle that they are turned by. The caller advances it.
    """

    def __init__(self, num_layers: int, num_rows: int, num_positions: int) -> None:
        super().__init__(max_batch_size=num_rows, max_sequence_length=num_positions)
        self.position: torch.Tensor | None = None
        self.key_value_memory_dict = {layer: (_Store(self), _Store(self)) for layer in range(1, num_layers + 1)}

    def start_prompt(self) -> None:
        """Write from position 0 again. What is left of an earlier generation has to be masked."""
        self.position = None
        self.sequence_len_offset = 0

    def start_decoding(self, position: torch.Tensor) -> None:
        """Write single positions at ``position``."""
        self.position = position
        # Megatron reads as far as the position it writes: told that this is the last one, it reads the whole cache.
        self.sequence_len_offset = self.max_sequence_length - 1

    def own_angles(self, angles: torch.Tensor) -> torch.Tensor:
        """Angles ``[k, 1, 1, d]`` of all positions -> the same shape: wherever Megatron reads, the next position's."""
        if self.position is None:
            return angles
        return angles.index_select(0, self.position).expand(angles.shape)


class _Store:
    """Keys or values ``[k, b, n, d]`` of one layer, written and read by Megatron as a tensor (attention.py:694)."""

    def __init__(self, cache: KeyValueCache) -> None:
        self._cache = cache
        self._shape = (cache.max_sequence_length, cache.max_batch_size)
        self._tensor: torch.Tensor | None = None

    def size(self, dim: int) -> int:
        return self._shape[dim]

    def __setitem__(self, index: Any, new: torch.Tensor) -> None:
        if self._tensor is None:
            # A masked value still takes part, with a weight of 0: it must be a number.
            self._tensor = new.new_zeros(*self._shape, *new.shape[2:])
        if self._cache.position is None:
            self._tensor[index] = new
        else:
            self._tensor.index_copy_(0, self._cache.position, new)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._tensor[index]
