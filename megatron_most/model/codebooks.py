"""Codec frames in and out of the model (layout ``frame``): summed codebook embeddings, one output head per codebook.

Shape letters: s positions (of this rank), b rows, h hidden size, C codebooks, K codes (padded).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class _ShardedModuleList(torch.nn.ModuleList):
    """A list whose members keep their sharding in checkpoints; Megatron takes plain containers for replicated."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for name, module in self.named_children():
            state.update(module.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata))
        return state


class CodebookEmbeddings(MegatronModule):
    """The sum of a frame's C code embeddings; tables are split over the tensor group by code."""

    def __init__(
        self, config: TransformerConfig, num_codebooks: int, padded_size: int, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(config=config)
        self.tp_group = pg_collection.tp
        self.tables = _ShardedModuleList(
            tensor_parallel.VocabParallelEmbedding(
                padded_size,
                config.hidden_size,
                init_method=config.embedding_init_method,
                config=config,
                tp_group=self.tp_group,
            )
            for _ in range(num_codebooks)
        )

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """``codes [b, s, C]`` (``NO_CODE`` adds nothing) -> ``[s, b, h]``, scattered under sequence parallelism."""
        total = None
        for codebook, table in enumerate(self.tables):
            code = codes[..., codebook].transpose(0, 1)
            is_mine = (code >= table.vocab_start_index) & (code < table.vocab_end_index)
            local = (code - table.vocab_start_index).masked_fill(~is_mine, 0)
            part = F.embedding(local, table.weight) * is_mine[..., None]
            total = part if total is None else total + part
        if self.config.sequence_parallel:
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(total, group=self.tp_group)
        return tensor_parallel.reduce_from_tensor_model_parallel_region(total, group=self.tp_group)


class CodebookHeads(MegatronModule):
    """One linear head per codebook, all predicting the next frame in parallel; split over the tensor group by code."""

    def __init__(
        self, config: TransformerConfig, num_codebooks: int, padded_size: int, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(config=config)
        self.tp_group = pg_collection.tp
        self.heads = _ShardedModuleList(
            tensor_parallel.ColumnParallelLinear(
                config.hidden_size,
                padded_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                # The sequence is gathered once for all heads, below; its backward sums their gradients over the group.
                disable_grad_reduce=True,
                tp_group=self.tp_group,
            )
            for _ in range(num_codebooks)
        )
        for head in self.heads:
            head.sequence_parallel = False
            head.weight.is_embedding_or_output_parameter = True

    def loss(self, hidden: torch.Tensor, code_labels: torch.Tensor) -> torch.Tensor:
        """Cross entropy of each codebook.

        Only positions that have a label go through the heads: text never pays for audio.

        Args:
            hidden: ``[s, b, h]``, scattered along s under sequence parallelism.
            code_labels: ``[b, s, C]`` of the whole sequence; ``NO_CODE`` has no loss.

        Returns:
            ``[b, s, C]`` fp32, zero where there is no label.
        """
        hidden = self._whole_sequence(hidden)
        labels = code_labels.transpose(0, 1)
        has_label = (labels >= 0).any(-1)
        rows, targets = hidden[has_label], labels[has_label]
        # Delayed codebooks begin and end apart from each other: a row may have labels for some of them only.
        losses = [
            tensor_parallel.vocab_parallel_cross_entropy(self._logits(head, rows), target.clamp(min=0)) * (target >= 0)
            for head, target in zip(self.heads, targets.unbind(-1), strict=True)
        ]
        out = hidden.new_zeros(*has_label.shape, len(self.heads), dtype=torch.float32)
        return out.masked_scatter(has_label[..., None], torch.stack(losses, dim=-1)).transpose(0, 1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden [s, b, h]`` -> ``[b, s, C, K]``, gathered over the tensor group."""
        hidden = self._whole_sequence(hidden)
        gathered = [
            tensor_parallel.gather_from_tensor_model_parallel_region(self._logits(head, hidden), group=self.tp_group)
            for head in self.heads
        ]
        return torch.stack(gathered, dim=2).transpose(0, 1)

    def _logits(self, head: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
        return head(rows)[0].float()

    def _whole_sequence(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.config.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=self.tp_group
            )
        return hidden
