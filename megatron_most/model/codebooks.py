"""Input and output of codec frames (layout ``frame``): summed codebook embeddings and one output head per codebook.

Shape letters: s positions (of this rank), b rows, h hidden size, C codebooks, K codes (padded),
tp tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import divide


class _CodebookWeights(MegatronModule):
    """A matrix ``[K, h]`` for each codebook, in one parameter ``weight [C, K / tp, h]``, split over the tensor group.

    In checkpoints every codebook has its own tensor, ``<checkpoint_name>.<codebook>.weight``.
    """

    checkpoint_name: str

    def __init__(
        self,
        config: TransformerConfig,
        num_codebooks: int,
        padded_size: int,
        pg_collection: ProcessGroupCollection,
        init_method: Callable[[torch.Tensor], object],
    ) -> None:
        super().__init__(config=config)
        self.tp_group = pg_collection.tp
        self.local_size = divide(padded_size, self.tp_group.size())
        shape = (num_codebooks, self.local_size, config.hidden_size)
        self.weight = torch.nn.Parameter(
            torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        tensor_parallel.set_tensor_model_parallel_attributes(self.weight, True, 1, 1)
        with tensor_parallel.get_cuda_rng_tracker().fork():
            init_method(self.weight)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        assert metadata is not None, "MegatronModule's callers pass it"
        axis = len(sharded_offsets)

        @torch.no_grad()
        def build(key: str, weight: torch.Tensor, replica_id: ReplicaId, flattened_range: None) -> list[ShardedTensor]:
            return [
                ShardedTensor.from_rank_offsets(
                    f"{key}.{codebook}.weight",
                    matrix,
                    *sharded_offsets,
                    (axis, self.tp_group.rank(), self.tp_group.size()),
                    replica_id=replica_id,
                    prepend_axis_num=axis,
                )
                for codebook, matrix in enumerate(weight)
            ]

        replica_id = (0, 0, metadata["dp_cp_group"].rank())
        key = f"{prefix}{self.checkpoint_name}"
        return {f"{prefix}weight": ShardedTensorFactory(key, self.weight, build, torch.stack, replica_id=replica_id)}


class CodebookEmbeddings(_CodebookWeights):
    """The sum of a frame's C code embeddings. Tables are split over the tensor group by code."""

    checkpoint_name = "tables"

    def __init__(
        self, config: TransformerConfig, num_codebooks: int, padded_size: int, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(config, num_codebooks, padded_size, pg_collection, config.embedding_init_method)
        self.first_code = self.tp_group.rank() * self.local_size
        # Row of code 0 of each codebook among this rank's rows of all tables; negative where another rank has it.
        first_rows = torch.arange(num_codebooks, device=self.weight.device) * self.local_size - self.first_code
        self.register_buffer("first_rows", first_rows, persistent=False)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """``codes [b, s, C]`` (``NO_CODE`` adds nothing) -> ``[s, b, h]``, scattered under sequence parallelism."""
        batch_size, length, _ = codes.shape
        codes = codes.transpose(0, 1).flatten(0, 1)
        is_mine = (codes >= self.first_code) & (codes < self.first_code + self.local_size)
        # Other ranks' codes and NO_CODE read an arbitrary row, with a weight of 0.
        total = F.embedding_bag(
            (codes + self.first_rows) * is_mine,
            self.weight.flatten(0, 1),
            mode="sum",
            per_sample_weights=is_mine.to(self.weight.dtype),
        ).view(length, batch_size, -1)
        if self.config.sequence_parallel:
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(total, group=self.tp_group)
        return tensor_parallel.reduce_from_tensor_model_parallel_region(total, group=self.tp_group)


class CodebookHeads(_CodebookWeights):
    """One linear head per codebook; all predict the next frame in parallel. Split over the tensor group by code."""

    checkpoint_name = "heads"

    def __init__(
        self, config: TransformerConfig, num_codebooks: int, padded_size: int, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(config, num_codebooks, padded_size, pg_collection, config.init_method)
        self.weight.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]  # Megatron's optimizer reads it

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden [..., h]`` of the whole sequence -> logits ``[..., C, K / tp]``.

        The gradient of ``hidden`` is a partial sum; it must be reduced over the tensor group.
        """
        return F.linear(hidden, self.weight.flatten(0, 1)).unflatten(-1, self.weight.shape[:2])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden [s, b, h]`` of the whole sequence -> ``[b, s, C, K]`` fp32, gathered over the tensor group."""
        logits = self(hidden).float()
        return tensor_parallel.gather_from_tensor_model_parallel_region(logits, group=self.tp_group).transpose(0, 1)
