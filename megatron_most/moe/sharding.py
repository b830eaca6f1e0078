"""Experts in checkpoints: one global tensor for each projection of a layer, its experts in logical order.

The names, shapes and cuts are those of Megatron's ``SequentialMLP``, whatever module computes the experts, so that any
expert backend, expert order and parallel layout reads what any other wrote: ``experts.linear_fc1.weight [E, 2f, h]``,
gate above up, and ``experts.linear_fc2.weight [E, h, f]``.

Shape letters: E experts, e experts of a local tensor, f width of an expert, h hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensor, ShardedTensorFactory

Offsets = Sequence[tuple[int, int, int]]
"""Megatron's ``sharded_offsets``: (axis, place, number of places) of the axes before a module's own."""


def shard_by_expert(
    key: str,
    weight: torch.Tensor,
    experts: Sequence[int],
    num_experts: int,
    sharded_offsets: Offsets,
    *,
    split_axis: int,
    num_parts: int,
    tensor_group: dist.ProcessGroup,
    data_group: dist.ProcessGroup,
) -> ShardedTensorFactory:
    """The piece of the global tensor ``key`` that a rank holds in one parameter.

    Args:
        weight: ``[e, ...]``, an expert of this rank in each row.
        experts: logical index of each row.
        num_experts: E.
        sharded_offsets: of the module.
        split_axis: axis of one expert's matrix that expert tensor parallelism splits.
        num_parts: matrices that lie one after another along that axis, each split on its own: gate and up.
        tensor_group: ranks among which each matrix is split.
        data_group: ranks that hold copies.
    """
    expert_axis = len(sharded_offsets)
    rank, size = tensor_group.rank(), tensor_group.size()

    @torch.no_grad()
    def build(key: str, tensor: torch.Tensor, replica_id: ReplicaId, flattened_range: None) -> list[ShardedTensor]:
        return [
            ShardedTensor.from_rank_offsets(
                key,
                piece,
                *sharded_offsets,
                (expert_axis, expert, num_experts),
                (expert_axis + 1 + split_axis, part * size + rank, num_parts * size),
                replica_id=replica_id,
                prepend_axis_num=expert_axis + 1,
            )
            for expert, matrix in zip(experts, tensor, strict=True)
            for part, piece in enumerate(matrix.chunk(num_parts, dim=split_axis))
        ]

    @torch.no_grad()
    def merge(pieces: list[torch.Tensor]) -> torch.Tensor:
        matrices = [torch.cat(pieces[at : at + num_parts], split_axis) for at in range(0, len(pieces), num_parts)]
        return torch.stack(matrices)

    return ShardedTensorFactory(key, weight, build, merge, replica_id=(0, 0, data_group.rank()))


def in_logical_order(state: dict[str, Any], expert_axis: int, physical_to_logical: Sequence[int]) -> dict[str, Any]:
    """``state`` of a module that numbers its experts by physical position, with their logical numbers instead.

    Args:
        state: a sharded state dict; only tensors that have an expert axis are in it.
        expert_axis: which global axis of them counts experts.
    """

    def renumbered(tensor: ShardedTensor) -> ShardedTensor:
        offset = list(tensor.global_offset)
        offset[expert_axis] = physical_to_logical[offset[expert_axis]]
        return dataclasses.replace(tensor, global_offset=tuple(offset))

    def renumbered_pieces(factory: ShardedTensorFactory) -> ShardedTensorFactory:
        original = factory.build_fn

        def build(*arguments: Any) -> list[ShardedTensor]:
            return [renumbered(piece) for piece in original(*arguments)]

        return dataclasses.replace(factory, build_fn=build)

    changes = {ShardedTensor: renumbered, ShardedTensorFactory: renumbered_pieces}
    return {key: changes.get(type(value), lambda other: other)(value) for key, value in state.items()}
