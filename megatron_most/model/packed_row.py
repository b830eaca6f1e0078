"""What attention needs to know about the documents of a packed row, computed once for all layers.

It follows from the documents' boundaries alone, which the host knows. The layers only index with tensors that are
already on the device, so the host never waits for it.

Shape letters: t positions of the row over all context-parallel ranks, s of them on this rank. For a batch of documents
of similar length: D documents; the longest has L positions, l of them on this rank.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_most.parallel import zigzag_positions_packed


@dataclasses.dataclass(frozen=True)
class DocumentBatch:
    """Documents that one attention call computes, padded to the longest.

    Padding repeats a document's last position. Causality hides it as a key, and its queries are dropped.

    query_index: ``[D, l]``, into the positions of this rank.
    key_index: ``[D, L]``, into the row.
    query_at: ``[D, 1, l, 1]``, positions of the queries in the row. None without context parallelism, where query i of
        a document is at its position i.
    key_at: ``[D, 1, 1, L]``, positions of the keys in the row, counted on beyond the document's end; None like
        ``query_at``.
    """

    query_index: torch.Tensor
    key_index: torch.Tensor
    query_at: torch.Tensor | None = None
    key_at: torch.Tensor | None = None

    def may_attend(self) -> torch.Tensor | None:
        """``[D, 1, l, L]`` bool; None where plain causality holds."""
        if self.query_at is None or self.key_at is None:
            return None
        return self.key_at <= self.query_at


@dataclasses.dataclass(frozen=True)
class DocumentBatches:
    """All documents of a row in batches, for attention kernels without support for packed rows.

    output_order: ``[s]``, index of each position of this rank in the concatenated outputs of ``documents``.
    gather_order: ``[t]``, index of each position of the row in the concatenation of all ranks' positions. None without
        context parallelism.
    """

    documents: list[DocumentBatch]
    output_order: torch.Tensor
    gather_order: torch.Tensor | None


@dataclasses.dataclass(frozen=True)
class Pieces:
    """This rank's queries and the keys that they see, for attention kernels that support packed rows.

    A piece is a document. Under context parallelism it is one of the two chunks of a document that this rank holds,
    with the keys from the document's beginning to the chunk's end. Its queries are thus the last positions of its keys.

    query_boundaries, key_boundaries: ``[pieces + 1]`` int32.
    max_queries, max_keys: those of the longest piece, rounded up.
    key_index: ``[k]``, index of each key in the concatenation of all ranks' positions. None without context
        parallelism.
    """

    query_boundaries: torch.Tensor
    key_boundaries: torch.Tensor
    max_queries: int
    max_keys: int
    key_index: torch.Tensor | None


@dataclasses.dataclass(kw_only=True)
class PackedRow(PackedSeqParams):
    """Megatron's description of a packed row, with what the portable attention needs.

    ``cu_seqlens_q`` and ``cu_seqlens_kv`` are on the device. ``max_seqlen_q`` and ``max_seqlen_kv`` are the length of
    the longest document, rounded up.

    boundaries: ``[documents + 1]`` int32, ``cu_seqlens`` on the host.
    positions: ``[s]``, position in the row of each position of this rank. None without context parallelism.
    document_positions: ``[s]``, position in its document of each position of this rank.
    """

    boundaries: torch.Tensor
    context_rank: int
    context_size: int
    positions: torch.Tensor | None
    document_positions: torch.Tensor

    @functools.cached_property
    def pieces(self) -> Pieces:
        """Computed on first use."""
        if self.context_size == 1:
            return Pieces(self.cu_seqlens_q, self.cu_seqlens_kv, self.max_seqlen_q, self.max_seqlen_kv, None)
        return _pieces(self.boundaries, self.context_rank, self.context_size, self.document_positions.device)

    @functools.cached_property
    def batches(self) -> DocumentBatches:
        """Computed on first use; kernels that support packed rows do not need it."""
        return _document_batches(self.boundaries, self.context_rank, self.context_size, self.document_positions.device)


def packed_row(
    cu_seqlens: torch.Tensor, context_rank: int = 0, context_size: int = 1, device: torch.device | str = "cpu"
) -> PackedRow:
    """The packed row from the view of one context-parallel rank, with its indices on ``device``.

    Args:
        cu_seqlens: ``[documents + 1]``, where the documents start and end in the whole row. With context parallelism,
            ``2 * context_size`` must divide every length.
    """
    boundaries = cu_seqlens.cpu().int()
    starts, lengths = boundaries[:-1].long(), boundaries.diff().long()
    document_positions = torch.arange(int(boundaries[-1])) - starts.repeat_interleave(lengths)
    shares = []
    if context_size > 1:
        shares = [zigzag_positions_packed(boundaries, context_rank, context_size)]
        document_positions = document_positions[shares[0]]
    cu_seqlens, document_positions, *shares = _on_device([boundaries, document_positions, *shares], device)
    longest = _rounded_up(lengths, boundaries)
    return PackedRow(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        boundaries=boundaries,
        context_rank=context_rank,
        context_size=context_size,
        positions=shares[0] if shares else None,
        document_positions=document_positions,
    )


def _rounded_up(lengths: torch.Tensor, boundaries: torch.Tensor) -> int:
    """The largest length, rounded up to a power of two, or to the row's length.

    Transformer Engine selects a kernel for every new value, which takes time.
    """
    return min(1 << (int(lengths.max()) - 1).bit_length(), int(boundaries[-1]))


def _pieces(boundaries: torch.Tensor, context_rank: int, context_size: int, device: torch.device) -> Pieces:
    """Two for each document, in the order in which the rank holds them."""
    chunks = boundaries.diff().long() // (2 * context_size)
    num_queries = chunks.repeat_interleave(2)
    num_keys = (chunks[:, None] * torch.tensor([context_rank + 1, 2 * context_size - context_rank])).flatten()
    ends = num_keys.cumsum(0)
    first = boundaries[:-1].long().repeat_interleave(2)  # the place in the row of a piece's first key
    key_at = torch.arange(int(ends[-1])) + (first - ends + num_keys).repeat_interleave(num_keys)
    shares = [zigzag_positions_packed(boundaries, rank, context_size) for rank in range(context_size)]
    query_boundaries, key_boundaries, key_index = _on_device(
        [F.pad(num_queries.cumsum(0), (1, 0)).int(), F.pad(ends, (1, 0)).int(), torch.cat(shares).argsort()[key_at]],
        device,
    )
    longest = _rounded_up(num_queries, boundaries), _rounded_up(num_keys, boundaries)
    return Pieces(query_boundaries, key_boundaries, *longest, key_index)


def _document_batches(
    boundaries: torch.Tensor, context_rank: int, context_size: int, device: torch.device
) -> DocumentBatches:
    """Put documents whose lengths have the same highest bit in one batch: few calls, and less than half is padding."""
    starts, lengths = boundaries[:-1, None].long(), boundaries.diff()[:, None].long()
    shares = []
    if context_size > 1:
        shares = [zigzag_positions_packed(boundaries, rank, context_size) for rank in range(context_size)]
    magnitude = torch.frexp(lengths[:, 0].double()).exponent
    output_order = torch.empty(int(boundaries[-1]) // context_size, dtype=torch.long)
    indices: list[torch.Tensor] = []
    num_outputs = 0
    for documents in (magnitude == m for m in magnitude.unique()):
        start, length = starts[documents], lengths[documents]
        key_offset = torch.arange(int(length.max()))
        query_offset = torch.arange(int(length.max()) // context_size)
        query_index = start // context_size + query_offset.minimum(length // context_size - 1)
        key_index = start + key_offset.minimum(length - 1)
        indices += [query_index, key_index]
        if shares:
            indices += [shares[context_rank][query_index][:, None, :, None], (start + key_offset)[:, None, None, :]]
        is_query = query_offset < length // context_size
        output_order[query_index[is_query]] = num_outputs + is_query.flatten().nonzero()[:, 0]
        num_outputs += query_index.numel()
    gather_order = [torch.cat(shares).argsort()] if shares else []
    output_order, *tensors = _on_device([output_order, *gather_order, *indices], device)
    gathered = tensors.pop(0) if shares else None
    documents = [DocumentBatch(*batch) for batch in itertools.batched(tensors, 4 if shares else 2)]
    return DocumentBatches(documents, output_order, gathered)


def _on_device(tensors: list[torch.Tensor], device: torch.device | str) -> list[torch.Tensor]:
    """Copy the tensors in one transfer that the host does not wait for."""
    # Each starts at a multiple of eight bytes, so that the copy can be viewed in its dtype.
    flat = torch.cat([F.pad(x.flatten().view(torch.uint8), (0, -x.nbytes % 8)) for x in tensors])
    if torch.device(device).type == "cuda":
        flat = flat.pin_memory()
    pieces = flat.to(device, non_blocking=True).split([-(-x.nbytes // 8) * 8 for x in tensors])
    return [piece[: x.nbytes].view(x.dtype).view(x.shape) for x, piece in zip(tensors, pieces, strict=True)]
