"""Weights and gradients by global name, so that ranks of any layout can be compared with one process.

Megatron's sharded state dict knows for each local tensor its global name, shape and offset. Weights are drawn whole
from a generator seeded by the name and cut; local gradients are put back together in the test process.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

Piece = tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]


def local_pieces(chunks: Iterable[torch.nn.Module]) -> Iterator[Piece]:
    """(global name, global shape, offset, view of the local parameter with the global number of dimensions)."""
    for chunk in chunks:
        metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
        yield from pieces_of(chunk.sharded_state_dict(metadata=metadata))


def pieces_of(state: dict[str, Any]) -> Iterator[Piece]:
    """The tensors of a sharded state dict, as :func:`local_pieces` describes them."""
    apply_factories(state)
    for value in _leaves(state):
        if isinstance(value, ShardedTensor):
            view = value.data.view(*[1] * value.prepend_axis_num, *value.data.shape)
            yield value.key, tuple(value.global_shape), tuple(value.global_offset), view


def fill_weights(chunks: list[torch.nn.Module], std: float = 0.1) -> None:
    """The same weights under every layout; norms near one."""
    with torch.no_grad():
        for key, shape, offset, view in local_pieces(chunks):
            generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
            whole = torch.randn(shape, generator=generator) * std
            if "norm" in key:
                whole += 1
            view.copy_(whole[_region(offset, view)])


def assemble(pieces_of_ranks: Iterable[list[Piece]]) -> dict[str, torch.Tensor]:
    """Whole tensors from the pieces of all ranks; copies of a piece on several ranks must agree."""
    whole: dict[str, torch.Tensor] = {}
    for pieces in pieces_of_ranks:
        for key, shape, offset, piece in pieces:
            target = whole.setdefault(key, torch.full(shape, float("nan")))
            region = _region(offset, piece)
            known = target[region]
            if not known.isnan().any():
                difference = (known - piece).abs().max()
                assert difference <= 1e-6 * max(1.0, piece.abs().max().item()), f"{key}: replicas differ"
            target[region] = piece
    missing = [key for key, tensor in whole.items() if tensor.isnan().any()]
    assert not missing, f"no rank holds all of {missing}"
    return whole


def _leaves(state: object) -> Iterator[object]:
    if isinstance(state, dict):
        for value in state.values():
            yield from _leaves(value)
    elif isinstance(state, list):
        for value in state:
            yield from _leaves(value)
    else:
        yield state


def _region(offset: tuple[int, ...], piece: torch.Tensor) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(offset, piece.shape, strict=True))
