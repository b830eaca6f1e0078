"""Context parallelism: which positions of a sequence a rank holds.

A sequence is cut into ``2 * size`` chunks of equal length and rank r takes the r-th from the front and from the back,
as Megatron's rotary embedding and Transformer Engine do: causal attention then costs every rank the same.

Shape letters: s positions of the whole sequence, t positions of a packed row, D documents.
"""

from __future__ import annotations

import torch


def zigzag_positions(length: int, rank: int, size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Positions ``[s / size]`` that context-parallel ``rank`` of ``size`` holds of a sequence of ``length`` positions.

    ``length`` is divisible by ``2 * size`` (any when ``size`` is 1). The host does not wait for ``device``.
    """
    if size == 1:
        return torch.arange(length, device=device)
    assert length % (2 * size) == 0, "a sequence cannot be shared out evenly"
    chunk = length // (2 * size)
    return torch.cat(
        [torch.arange(place * chunk, (place + 1) * chunk, device=device) for place in (rank, 2 * size - 1 - rank)]
    )


def zigzag_positions_packed(cu_seqlens: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """Positions ``[t / size]`` that a rank holds of a packed row: its share of every document, one after the other.

    The host waits for the device of ``cu_seqlens``: give it on the host, and once for all layers.

    Args:
        cu_seqlens: ``[D + 1]``, where the documents of the row begin and end; every length is divisible by
            ``2 * size`` (any when ``size`` is 1).
    """
    boundaries = cu_seqlens.long()
    if size == 1:
        return torch.arange(int(boundaries[-1]), device=boundaries.device)
    chunk = boundaries.diff() // (2 * size)
    assert torch.equal(chunk * 2 * size, boundaries.diff()), "a document cannot be shared out evenly"
    starts = boundaries[:-1]
    document = torch.repeat_interleave(2 * chunk)
    place = torch.arange(document.numel(), device=boundaries.device) - (starts // size)[document]
    chunk = chunk[document]
    # The second chunk of a rank follows its first: it has to move on by the chunks of others that lie between them.
    return starts[document] + place + torch.where(place < chunk, rank, 2 * size - 2 - rank) * chunk
