"""What attention has to know of the documents in a packed row, worked out once for all layers.

Nothing but the boundaries of the documents decides which positions attend to which, and the host knows them. Each layer
then only indexes with tensors that are on the device already, and never makes the host wait for the device.

Shape letters: t positions of the row over all context-parallel ranks, s of them on this rank; of a few documents of
similar length: D their number, L positions and l positions on this rank of the longest.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.nn.functional as F
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


@dataclasses.dataclass(frozen=True)
class DocumentBatches:
    """All documents of a row, in batches, for attention that knows no documents.

    output_order: ``[s]``, where each position of this rank stands in the outputs of ``documents``, one after the other.
    gather_order: ``[t]``, where each position of the row stands in what the ranks hold, one after the other. None
        without context parallelism.
    """

    documents: list[DocumentBatch]
    output_order: torch.Tensor
    gather_order: torch.Tensor | None


@dataclasses.dataclass(kw_only=True)
class PackedRow(PackedSeqParams):
    """Megatron's description of a packed row, and what the portable attention needs beside it.

    ``cu_seqlens_q`` and ``cu_seqlens_kv`` are on the device, for kernels that know documents; ``max_seqlen_q`` and
    ``max_seqlen_kv`` are the longest document's length rounded up, which such kernels take as well.

    boundaries: ``[documents + 1]`` int32, the same on the host.
    positions: ``[s]``, where in the row the positions of this rank stand. None without context parallelism.
    document_positions: ``[s]``, where in its document each position of this rank stands.
    """

    boundaries: torch.Tensor
    context_rank: int
    context_size: int
    positions: torch.Tensor | None
    document_positions: torch.Tensor

    @functools.cached_property
    def batches(self) -> DocumentBatches:
        """Made when a layer first asks, for kernels that know documents never do."""
        return _document_batches(self.boundaries, self.context_rank, self.context_size, self.document_positions.device)


def packed_row(
    cu_seqlens: torch.Tensor, context_rank: int = 0, context_size: int = 1, device: torch.device | str = "cpu"
) -> PackedRow:
    """The packed row as one context-parallel rank sees it, with its indices on ``device``.

    Args:
        cu_seqlens: ``[documents + 1]``, where the documents begin and end in the whole row; every length is divisible
            by ``2 * context_size`` (any when that is 1).
    """
    boundaries = cu_seqlens.cpu().int()
    starts, lengths = boundaries[:-1].long(), boundaries.diff().long()
    document_positions = torch.arange(int(boundaries[-1])) - starts.repeat_interleave(lengths)
    positions = None
    if context_size > 1:
        positions = zigzag_positions_packed(boundaries, context_rank, context_size)
        document_positions = document_positions[positions]
    [(on_device, positions, document_positions)] = _on_device([(boundaries, positions, document_positions)], device)
    # Transformer Engine selects its kernel anew for every length that it has not seen: let there be few.
    longest = min(1 << (int(lengths.max()) - 1).bit_length(), int(boundaries[-1]))
    return PackedRow(
        qkv_format="thd",
        cu_seqlens_q=on_device,
        cu_seqlens_kv=on_device,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        boundaries=boundaries,
        context_rank=context_rank,
        context_size=context_size,
        positions=positions,
        document_positions=document_positions,
    )


def _document_batches(
    boundaries: torch.Tensor, context_rank: int, context_size: int, device: torch.device
) -> DocumentBatches:
    """Documents whose lengths share their highest bit become one batch: few calls, less than half of it padding."""
    starts, lengths = boundaries[:-1, None].long(), boundaries.diff()[:, None].long()
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
    (output_order, gather_order), *indices = _on_device([(output_order, gather_order), *indices], device)
    return DocumentBatches([DocumentBatch(*tensors) for tensors in indices], output_order, gather_order)


def _on_device(
    groups: list[tuple[torch.Tensor | None, ...]], device: torch.device | str
) -> list[tuple[torch.Tensor | None, ...]]:
    """The tensors, taken over in one copy that the host does not wait for."""
    tensors = [tensor for group in groups for tensor in group if tensor is not None]
    # Each begins at a multiple of eight bytes, so that it can be read as numbers again.
    flat = torch.cat([F.pad(x.flatten().view(torch.uint8), (0, -x.nbytes % 8)) for x in tensors])
    if torch.device(device).type == "cuda":
        flat = flat.pin_memory()
    pieces = iter(flat.to(device, non_blocking=True).split([-(-x.nbytes // 8) * 8 for x in tensors]))
    return [
        tuple(None if x is None else next(pieces)[: x.nbytes].view(x.dtype).view(x.shape) for x in group)
        for group in groups
    ]
