"""The keys and values of a generation's past, in tensors whose shape does not change from one position to the next.

Megatron's own context cuts the cache at the current position, which the host has to know: each position has shapes of
its own, and no CUDA graph can repeat it. Here the position is a tensor.

Shape letters: b rows, k positions of the cache, s new positions, n heads, d head size.
"""

from __future__ import annotations

import torch
from megatron.core.inference.contexts import StaticInferenceContext


class KeyValueCache(StaticInferenceContext):
    """A context for prompts, whose positions are written from 0 on, and then for one position at a time.

    ``position`` is None while the prompts are read. Then it is a tensor ``[1]`` of int64: where the next keys and
    values are written, and the position they are rotated by. The caller advances it.
    """

    def __init__(self, num_rows: int, num_positions: int) -> None:
        super().__init__(max_batch_size=num_rows, max_sequence_length=num_positions)
        self.position: torch.Tensor | None = None

    def start_prompt(self) -> None:
        """Write from position 0 again. What is left of an earlier generation has to be masked."""
        self.position = None
        self.sequence_len_offset = 0

    def start_decoding(self, position: torch.Tensor) -> None:
        """Write single positions at ``position``."""
        self.position = position
        self.sequence_len_offset = self.max_sequence_length - 1  # Megatron's block asks whether there is a past

    def update(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write ``[s, b, n, d]`` of a layer, and return what its queries attend to.

        That is the prompt itself, and in decoding the whole cache ``[k, b, n, d]``.
        """
        if layer not in self.key_value_memory_dict:
            # A masked value still takes part, with a weight of 0: it must be a number.
            shape = (self.max_sequence_length, self.max_batch_size)
            self.key_value_memory_dict[layer] = tuple(new.new_zeros(*shape, *new.shape[2:]) for new in (key, value))
        kept = self.key_value_memory_dict[layer]
        for memory, new in zip(kept, (key, value), strict=True):
            if self.position is None:
                memory[: len(new)] = new
            else:
                memory.index_copy_(0, self.position, new)
        return (key, value) if self.position is None else kept
