"""Experts in checkpoints: one global tensor for each projection of a layer, with its experts in logical order.

Keys, shapes, and shards are those of Megatron's ``SequentialMLP``, whatever module computes the experts:
``experts.linear_fc1.weight [E, 2f, h]``, gate above up, and ``experts.linear_fc2.weight [E, h, f]``. Any expert
backend, expert order, and parallel layout therefore reads what any other wrote.

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
"""Megatron's ``sharded_offsets``: (axis, offset, number of offsets) of the axes before a module's own."""


@dataclasses.dataclass(frozen=True)
class ExpertShards:
    """Where a rank's experts belong in the global tensors of a layer.

    Args:
        experts: logical index of each local expert.
        num_experts: E.
        tensor_group: ranks that split each expert's matrices.
        data_group: ranks that hold copies.
        sharded_offsets: those of the module.
    """

    experts: Sequence[int]
    num_experts: int
    tensor_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    sharded_offsets: Offsets

    def of(self, key: str, weight: torch.Tensor, split_axis: int, num_parts: int) -> ShardedTensorFactory:
        """The shards of the global tensor ``key`` that this rank holds in ``weight [e, ...]``.

        Args:
            split_axis: the axis of an expert's matrix that expert tensor parallelism splits.
            num_parts: matrices that follow each other along that axis, each split separately: 2 for gate and up.
        """
        expert_axis = len(self.sharded_offsets)
        rank, size = self.tensor_group.rank(), self.tensor_group.size()

        @torch.no_grad()
        def build(key: str, tensor: torch.Tensor, replica_id: ReplicaId, flattened_range: None) -> list[ShardedTensor]:
            return [
                ShardedTensor.from_rank_offsets(
                    key,
                    piece,
                    *self.sharded_offsets,
                    (expert_axis, expert, self.num_experts),
                    (expert_axis + 1 + split_axis, part * size + rank, num_parts * size),
                    replica_id=replica_id,
                    prepend_axis_num=expert_axis + 1,
                )
                for expert, matrix in zip(self.experts, tensor, strict=True)
                for part, piece in enumerate(matrix.chunk(num_parts, dim=split_axis))
            ]

        @torch.no_grad()
        def merge(pieces: list[torch.Tensor]) -> torch.Tensor:
            matrices = [torch.cat(pieces[at : at + num_parts], split_axis) for at in range(0, len(pieces), num_parts)]
            return torch.stack(matrices)

        return ShardedTensorFactory(key, weight, build, merge, replica_id=(0, 0, self.data_group.rank()))


def in_logical_order(state: dict[str, Any], expert_axis: int, physical_to_logical: Sequence[int]) -> dict[str, Any]:
    """Renumber the experts of a sharded state dict from physical position to logical index.

    Args:
        state: all of its tensors must have an expert axis.
        expert_axis: the global axis that counts experts.
    """

    def renumbered(tensor: ShardedTensor) -> ShardedTensor:
        offset = list(tensor.global_offset)
        offset[expert_axis] = physical_to_logical[offset[expert_axis]]
        return dataclasses.replace(tensor, global_offset=tuple(offset))

    def renumbered_shards(factory: ShardedTensorFactory) -> ShardedTensorFactory:
        original = factory.build_fn

        def build(*arguments: Any) -> list[ShardedTensor]:
            return [renumbered(piece) for piece in original(*arguments)]

        return dataclasses.replace(factory, build_fn=build)

    changes = {ShardedTensor: renumbered, ShardedTensorFactory: renumbered_shards}
    return {key: changes.get(type(value), lambda other: other)(value) for key, value in state.items()}
