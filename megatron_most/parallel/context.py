"""Context parallelism: which positions of a sequence a rank holds.

Shape letters: s positions of the whole sequence.
"""

from __future__ import annotations

import torch


def zigzag_positions(length: int, rank: int, size: int) -> torch.Tensor:
    """Positions ``[s / size]`` that context-parallel ``rank`` of ``size`` holds of a sequence of ``length`` positions.

    The sequence is cut into ``2 * size`` chunks and rank r takes the r-th from the front and from the back, as
    Megatron's rotary embedding and Transformer Engine do: causal attention then costs every rank the same.
    """
    chunks = torch.arange(length).chunk(2 * size)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])
