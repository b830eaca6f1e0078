"""A key-value cache whose tensor shapes do not change during generation, so that a CUDA graph can replay a step.

Megatron's context slices the cache at the current position, a number on the host. Here the position is a tensor.

Shape letters: b rows, k positions of the cache, s new positions, n heads, d head size.
"""

from __future__ import annotations

import torch
from megatron.core.inference.contexts import StaticInferenceContext


class KeyValueCache(StaticInferenceContext):
    """Holds the keys and values of the prompts, then of one new position at a time.

    ``position`` is None while the prompts are read. After that it is an int64 tensor ``[1]``: where the next keys and
    values are written, which is also their rotary position. The caller advances it.
    """

    def __init__(self, num_rows: int, num_positions: int) -> None:
        super().__init__(max_batch_size=num_rows, max_sequence_length=num_positions)
        self.position: torch.Tensor | None = None

    def start_prompt(self) -> None:
        """Start again at position 0. The caller must mask what earlier generations left behind."""
        self.position = None
        self.sequence_len_offset = 0

    def start_decoding(self, position: torch.Tensor) -> None:
        """From now on, write one position at a time, at ``position``."""
        self.position = position
        self.sequence_len_offset = self.max_sequence_length - 1  # Megatron's block checks that it is not 0

    def update(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values ``[s, b, n, d]`` of a layer, and return those to attend to.

        While prompts are read these are the arguments themselves; after that, the whole cache ``[k, b, n, d]``.
        """
        if layer not in self.key_value_memory_dict:
            # Zeros, not empty: masked values are multiplied by 0 and must not be NaN.
            shape = (self.max_sequence_length, self.max_batch_size)
            self.key_value_memory_dict[layer] = tuple(new.new_zeros(*shape, *new.shape[2:]) for new in (key, value))
        kept = self.key_value_memory_dict[layer]
        for memory, new in zip(kept, (key, value), strict=True):
            if self.position is None:
                memory[: len(new)] = new
            else:
                memory.index_copy_(0, self.position, new)
        return (key, value) if self.position is None else kept
