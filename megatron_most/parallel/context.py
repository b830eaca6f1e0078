"""Context parallelism: which positions of a sequence a rank holds.

A sequence is cut into ``2 * size`` chunks of equal length. Rank r holds the r-th chunk from the front and the r-th from
the back, as in Megatron's rotary embedding and Transformer Engine, so causal attention costs every rank the same.

Shape letters: s positions of the whole sequence, t positions of a packed row, D documents.
"""

from __future__ import annotations

import torch


def zigzag_positions(length: int, rank: int, size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Positions ``[s / size]`` that context-parallel ``rank`` of ``size`` holds of a sequence of ``length`` positions.

    ``length`` must be divisible by ``2 * size``, unless ``size`` is 1. Does not synchronize the host with ``device``.
    """
    if size == 1:
        return torch.arange(length, device=device)
    assert length % (2 * size) == 0, "the sequence does not divide evenly"
    chunk = length // (2 * size)
    return torch.cat(
        [torch.arange(place * chunk, (place + 1) * chunk, device=device) for place in (rank, 2 * size - 1 - rank)]
    )


def zigzag_positions_packed(cu_seqlens: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """Positions ``[t / size]`` that a rank holds of a packed row: its part of every document, in order.

    Synchronizes the host with the device of ``cu_seqlens``: pass it on the host, and once for all layers.

    Args:
        cu_seqlens: ``[D + 1]``, the boundaries of the documents in the row. Every length must be divisible by
            ``2 * size``, unless ``size`` is 1.
    """
    boundaries = cu_seqlens.long()
    if size == 1:
        return torch.arange(int(boundaries[-1]), device=boundaries.device)
    chunk = boundaries.diff() // (2 * size)
    assert torch.equal(chunk * 2 * size, boundaries.diff()), "a document does not divide evenly"
    starts = boundaries[:-1]
    document = torch.repeat_interleave(2 * chunk)
    place = torch.arange(document.numel(), device=boundaries.device) - (starts // size)[document]
    chunk = chunk[document]
    # The rank's second chunk directly follows its first so far: skip the other ranks' chunks between them.
    return starts[document] + place + torch.where(place < chunk, rank, 2 * size - 2 - rank) * chunk
