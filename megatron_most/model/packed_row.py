"""What attention has to know of the documents in a packed row, worked out once for all layers.

Nothing but the boundaries of the documents decides which positions attend to which, and the host knows them. Each layer
then only indexes with tensors that are on the device already, and never makes the host wait for the device.

Shape letters: t positions of the row over all context-parallel ranks, s of them on this rank; of a few documents of
similar length: D their number, L positions and l positions on this rank of the longest.
"""

from __future__ import annotations

import dataclasses

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_most.parallel import zigzag_positions_packed


@dataclasses.dataclass(frozen=True)
class DocumentBatch:
    """Documents that attend in one call.

    Beyond its end a document repeats its last position: causality hides it as a key, and no query of it is kept.

    query_index: ``[D, l]``, into the positions of this rank.
    key_index: ``[D, L]``, into the row.
    query_at: ``[D, 1, l, 1]``, where in the row the queries stand. None without context parallelism, where query i of a
        document is its position i.
    key_at: ``[D, 1, 1, L]``, where in the row the keys stand, going on beyond the document's end. None as before.
    """

    query_index: torch.Tensor
    key_index: torch.Tensor
    query_at: torch.Tensor | None
    key_at: torch.Tensor | None


@dataclasses.dataclass(kw_only=True)
class PackedRow(PackedSeqParams):
    """Megatron's description of a packed row, and the indices that attention needs beside it.

    ``cu_seqlens_q`` and ``cu_seqlens_kv`` are on the host: Megatron's rotary embedding reads them as numbers in every
    layer of grouped-query attention.

    batches: all documents.
    output_order: ``[s]``, where each position of this rank stands in the outputs of ``batches``, one after the other.
    positions: ``[s]``, where in the row the positions of this rank stand. None without context parallelism.
    gather_order: ``[t]``, where each position of the row stands in what the ranks hold, one after the other. None as
        before.
    document_positions: ``[t]``, where in its document each position of the row stands.
    """

    batches: list[DocumentBatch]
    output_order: torch.Tensor
    positions: torch.Tensor | None
    gather_order: torch.Tensor | None
    document_positions: torch.Tensor


def packed_row(
    cu_seqlens: torch.Tensor, context_rank: int = 0, context_size: int = 1, device: torch.device | str = "cpu"
) -> PackedRow:
    """The packed row as one context-parallel rank sees it, with its indices on ``device``.

    Documents whose lengths share their highest bit become one batch: few calls, less than half of it padding.

    Args:
        cu_seqlens: ``[documents + 1]``, where the documents begin and end in the whole row; every length is divisible
            by ``2 * context_size`` (any when that is 1).
    """
    boundaries = cu_seqlens.cpu()
    starts, lengths = boundaries[:-1, None].long(), boundaries.diff()[:, None].long()
    document_positions = torch.arange(int(boundaries[-1])) - starts[:, 0].repeat_interleave(lengths[:, 0])
    positions = gather_order = None
    if context_size > 1:
        shares = [zigzag_positions_packed(boundaries, rank, context_size) for rank in range(context_size)]
        positions, gather_order = shares[context_rank], torch.cat(shares).argsort()
    magnitude = torch.frexp(lengths[:, 0].double()).exponent
    output_order = torch.empty(int(boundaries[-1]) // context_size, dtype=torch.long)
    indices: list[tuple[torch.Tensor | None, ...]] = []
    num_outputs = 0
    for documents in (magnitude == m for m in magnitude.unique()):
        start, length = starts[documents], lengths[documents]
        key_offset = torch.arange(int(length.max()))
        query_offset = torch.arange(int(length.max()) // context_size)
        query_index = start // context_size + query_offset.minimum(length // context_size - 1)
        key_index = start + key_offset.minimum(length - 1)
        query_at = key_at = None
        if positions is not None:
            query_at, key_at = positions[query_index][:, None, :, None], (start + key_offset)[:, None, None, :]
        indices.append((query_index, key_index, query_at, key_at))
        is_query = query_offset < length // context_size
        output_order[query_index[is_query]] = num_outputs + is_query.flatten().nonzero()[:, 0]
        num_outputs += query_index.numel()
    (output_order, positions, gather_order, document_positions), *indices = _on_device(
        [(output_order, positions, gather_order, document_positions), *indices], torch.device(device)
    )
    longest = int(lengths.max())
    return PackedRow(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        batches=[DocumentBatch(*tensors) for tensors in indices],
        output_order=output_order,
        positions=positions,
        gather_order=gather_order,
        document_positions=document_positions,
    )


def _on_device(
    groups: list[tuple[torch.Tensor | None, ...]], device: torch.device
) -> list[tuple[torch.Tensor | None, ...]]:
    """Tensors of one dtype, taken over in one copy that the host does not wait for."""
    tensors = [tensor for group in groups for tensor in group if tensor is not None]
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    if device.type == "cuda":
        flat = flat.pin_memory()
    pieces = iter(flat.to(device, non_blocking=True).split([tensor.numel() for tensor in tensors]))
    return [tuple(None if x is None else next(pieces).view(x.shape) for x in group) for group in groups]
