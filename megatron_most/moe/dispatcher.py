"""The all-to-all dispatcher for tokens that differ in their number of experts: padding has none, a modality its top-k.

Shape letters: n tokens of this rank, E experts in physical order, h hidden size, r (token, expert) pairs of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection, permute
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_most.moe.experts import GroupedExperts


class ModalityAwareMoELayer(MoELayer):
    """Megatron's MoE layer, with :class:`AlltoAllDispatcher` in place of Megatron's ``alltoall`` dispatcher."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
    ) -> None:
        groups = pg_collection or get_default_pg_collection()
        super().__init__(config, submodules, layer_number, groups, is_mtp_layer, name)
        if config.moe_token_dispatcher_type == "alltoall":
            self.token_dispatcher = AlltoAllDispatcher(
                self.num_local_experts, self.local_expert_indices, config, groups
            )
            if self.shared_expert_overlap:
                self.token_dispatcher.set_shared_experts(self.shared_experts)

    def forward(
        self, hidden_states: torch.Tensor, intermediate_tensors: Any = None, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As in Megatron. A generation step, which has one position per row, does not need the dispatcher."""
        if hidden_states.shape[0] > 1 or torch.is_grad_enabled() or not self._can_decode:
            return super().forward(hidden_states, intermediate_tensors, padding_mask)
        assert padding_mask is not None
        probs, _ = self.route(hidden_states, padding_mask.transpose(0, 1))
        output = self.experts.decode(hidden_states.flatten(0, 1), probs).view_as(hidden_states)
        return output + self.shared_experts(hidden_states) if self.use_shared_expert else output, None

    @property
    def _can_decode(self) -> bool:
        return isinstance(self.experts, GroupedExperts) and self.experts.can_decode and not self.shared_expert_overlap


class AlltoAllDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's all-to-all dispatcher, sending one row per (token, expert) pair.

    Megatron (0.19.2, token_dispatcher.py:550) assumes n x top-k pairs, or reads their number from the device when a
    capacity factor is set. Here the number varies. To avoid another synchronization, rows are permuted where the
    dispatcher already waits for the token counts: before the all-to-all.
    """

    _found: _Found | None = None
    _pairs: _Pairs | None = None

    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        """Routing map ``[n, E]`` bool -> tokens of each local expert. Counts are on the host before the all-to-all."""
        tokens_per_expert = super().preprocess(routing_map)
        self._maybe_update_cuda_sync_point("before_ep_alltoall")
        return tokens_per_expert

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states ``[..., h]``, map and probs ``[n, E]`` -> tokens ``[n, h]`` and probs, not permuted yet."""
        self.hidden_shape, self.probs, self.routing_map = hidden_states.shape, probs, routing_map
        tokens = hidden_states.view(-1, hidden_states.shape[-1])
        self.hidden_shape_before_permute = tokens.shape
        self.tokens_per_expert = self.preprocess(routing_map)
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(hidden_states)
        # Starts copying the counts to the host; token_dispatch waits for them.
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_permutation_1", self.tokens_per_expert)
        if not self.config.moe_permute_fusion:  # work for the device in the meantime
            self._found = _Found.in_map(routing_map, self.num_out_tokens)
        return tokens, probs

    def token_dispatch(self, tokens: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens ``[n, h]`` and probs ``[n, E]`` -> the rows and probs this rank receives, one per pair."""
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_ep_alltoall", self.tokens_per_expert)
        # Without expert parallelism there are no splits: all pairs stay on this rank.
        num_pairs = sum((self.tokens_per_expert if self.input_splits is None else self.input_splits).tolist())
        if self.config.moe_permute_fusion:
            rows, row_probs, self.reversed_local_input_permutation_mapping, *_ = permute(
                tokens, self.routing_map, probs=probs, num_out_tokens=num_pairs, fused=True
            )
        else:
            assert self._found is not None, "dispatch_preprocess comes first"
            self._pairs = pairs = self._found.pairs(num_pairs)
            rows, row_probs = _Permute.apply(tokens, pairs), probs.flatten().index_select(0, pairs.cell)
            self._found = None
        return super().token_dispatch(rows, row_probs)

    def dispatch_postprocess(
        self, global_input_tokens: torch.Tensor, global_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows sorted by local expert, tokens per expert, probs. On one rank, rows are in that order already."""
        if self.ep_size * self.tp_size > 1:
            return super().dispatch_postprocess(global_input_tokens, global_probs)
        tokens_per_expert, self.tokens_per_expert = self.tokens_per_expert, None  # type: ignore[assignment]  # as Megatron
        return global_input_tokens, tokens_per_expert, global_probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Rows in the order in which this rank received them."""
        return super().combine_preprocess(hidden_states) if self.ep_size * self.tp_size > 1 else hidden_states

    def combine_postprocess(self, permutated_local_input_tokens: torch.Tensor) -> torch.Tensor:
        """Rows ``[r, h]`` by expert -> ``[..., h]``, the sum of each token's rows, plus the shared experts' output."""
        # Megatron keeps them. They lead through the graph to hooks that lead back here, a cycle no collector can see: a
        # model that has made a step would never be freed.
        self.probs = None  # type: ignore[assignment]
        if self.config.moe_permute_fusion:
            output = super().combine_postprocess(permutated_local_input_tokens)
            self.routing_map = self.reversed_local_input_permutation_mapping = None  # type: ignore[assignment]
            return output
        self.routing_map = None  # type: ignore[assignment]
        assert self._pairs is not None, "token_dispatch comes first"
        output = _Unpermute.apply(permutated_local_input_tokens, self._pairs).view(self.hidden_shape)
        self._pairs = None
        if self.shared_experts is not None:
            output += self.shared_experts.get_output()
        return output


@dataclass
class _Pairs:
    """The (token, expert) pairs of a routing map ``[n, E]``: one row per pair, sorted by expert, then by token.

    Args:
        token: ``[r]``, the token of each row.
        cell: ``[r]``, ``token * E + expert`` of each row.
        rows: ``[r]``, the indices of the rows, sorted by token, then by expert.
        starts: ``[n + 1]``, where each token's indices start in ``rows``, and the end.
    """

    token: torch.Tensor
    cell: torch.Tensor
    rows: torch.Tensor
    starts: torch.Tensor

    def gather(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[n, h]`` -> ``[r, h]``: the token of each row."""
        return tokens.index_select(0, self.token)

    def sum(self, rows: torch.Tensor) -> torch.Tensor:
        """``[r, h]`` -> ``[n, h]``: the sum of each token's rows, accumulated in fp32 in the order of experts.

        Uses no atomic additions, which are slow in bf16 and not deterministic.
        """
        return F.embedding_bag(self.rows, rows.detach(), self.starts, mode="sum", include_last_offset=True)


@dataclass
class _Found:
    """The part of :class:`_Pairs` that can be computed before the host knows the number of pairs.

    Args:
        places: ``[room, 2]``, expert and token of each row; entries after the last pair are undefined.
        before: ``[n * E + 1]``, how many pairs the map holds before each cell, in row-major order.
    """

    places: torch.Tensor
    before: torch.Tensor
    num_experts: int

    @classmethod
    def in_map(cls, routing_map: torch.Tensor, room: int) -> _Found:
        before = routing_map.new_zeros(routing_map.numel() + 1, dtype=torch.long)
        torch.cumsum(routing_map.flatten(), 0, out=before[1:])
        return cls(routing_map.T.nonzero_static(size=room), before, routing_map.shape[1])

    def pairs(self, num_pairs: int) -> _Pairs:
        expert, token = self.places[:num_pairs].unbind(1)
        cell = torch.add(expert, token, alpha=self.num_experts)
        place = self.before.index_select(0, cell)
        rows = torch.empty_like(place).scatter_(0, place, torch.arange(num_pairs, device=place.device))
        return _Pairs(token, cell, rows, self.before[:: self.num_experts].contiguous())


class _Permute(torch.autograd.Function):
    """:meth:`_Pairs.gather`, whose backward is :meth:`_Pairs.sum`."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, pairs: _Pairs) -> torch.Tensor:
        ctx.pairs = pairs
        return pairs.gather(tokens)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.pairs.sum(gradient), None


class _Unpermute(torch.autograd.Function):
    """:meth:`_Pairs.sum`, whose backward is :meth:`_Pairs.gather`."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, pairs: _Pairs) -> torch.Tensor:
        ctx.pairs = pairs
        return pairs.sum(rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.pairs.gather(gradient), None
