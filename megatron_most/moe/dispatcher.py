"""The all-to-all dispatcher for tokens with different numbers of experts: padding has none, a modality its own top-k.

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
    """Megatron's expert layer; its ``alltoall`` dispatcher is :class:`AlltoAllDispatcher`."""

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
        """As Megatron's; without a dispatcher for the single position of each row that a step of generation has."""
        if hidden_states.shape[0] > 1 or torch.is_grad_enabled() or not self._can_decode:
            return super().forward(hidden_states, intermediate_tensors, padding_mask)
        probs, _ = self.route(hidden_states, padding_mask.transpose(0, 1))
        output = self.experts.decode(hidden_states.flatten(0, 1), probs).view_as(hidden_states)
        return output + self.shared_experts(hidden_states) if self.use_shared_expert else output, None

    @property
    def _can_decode(self) -> bool:
        return isinstance(self.experts, GroupedExperts) and self.experts.can_decode and not self.shared_expert_overlap


class AlltoAllDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's all-to-all, which sends as many rows as there are (token, expert) pairs.

    Megatron (0.19.2, token_dispatcher.py:550) takes n x top-k for that number, so that the host need not ask the device
    for it, or asks for it once more when a capacity is set. Here rows are laid out where the dispatcher waits for the
    counts of all experts anyway: before it sends.
    """

    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        """Routing map ``[n, E]`` bool -> tokens of each local expert; the host knows all counts before it sends."""
        tokens_per_expert = super().preprocess(routing_map)
        self._maybe_update_cuda_sync_point("before_ep_alltoall")
        return tokens_per_expert

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states ``[..., h]``, map and probs ``[n, E]`` -> tokens ``[n, h]`` and probs, not yet permuted."""
        self.hidden_shape, self.probs, self.routing_map = hidden_states.shape, probs, routing_map
        tokens = hidden_states.view(-1, hidden_states.shape[-1])
        self.hidden_shape_before_permute = tokens.shape
        self.tokens_per_expert = self.preprocess(routing_map)
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(hidden_states)
        # Here the copies to the host start; waiting for them is left to token_dispatch.
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_permutation_1", self.tokens_per_expert)
        if not self.config.moe_permute_fusion:  # what the device can do meanwhile
            self._found = _Found.in_map(routing_map, self.num_out_tokens)
        return tokens, probs

    def token_dispatch(self, tokens: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens ``[n, h]`` and probs ``[n, E]`` -> rows and probs by expert, sent: as many as pairs came."""
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_ep_alltoall", self.tokens_per_expert)
        # On one rank there are no splits: all its pairs are for its own experts.
        num_pairs = sum((self.tokens_per_expert if self.input_splits is None else self.input_splits).tolist())
        if self.config.moe_permute_fusion:
            rows, row_probs, self.reversed_local_input_permutation_mapping, *_ = permute(
                tokens, self.routing_map, probs=probs, num_out_tokens=num_pairs, fused=True
            )
        else:
            self._pairs = pairs = self._found.pairs(num_pairs)
            rows, row_probs = _Permute.apply(tokens, pairs), probs.flatten().index_select(0, pairs.cell)
            self._found = None
        return super().token_dispatch(rows, row_probs)

    def dispatch_postprocess(
        self, global_input_tokens: torch.Tensor, global_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows by local expert, tokens of each, probs; one rank's rows are in that order as they are."""
        if self.ep_size * self.tp_size > 1:
            return super().dispatch_postprocess(global_input_tokens, global_probs)
        tokens_per_expert, self.tokens_per_expert = self.tokens_per_expert, None
        return global_input_tokens, tokens_per_expert, global_probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Rows in the order in which they came."""
        return super().combine_preprocess(hidden_states) if self.ep_size * self.tp_size > 1 else hidden_states

    def combine_postprocess(self, permutated_local_input_tokens: torch.Tensor) -> torch.Tensor:
        """Rows ``[r, h]`` by expert -> the sum of each token's, ``[..., h]``, and of what shared experts gave."""
        if self.config.moe_permute_fusion:
            return super().combine_postprocess(permutated_local_input_tokens)
        output = _Unpermute.apply(permutated_local_input_tokens, self._pairs).view(self.hidden_shape)
        self._pairs = None
        if self.shared_experts is not None:
            output += self.shared_experts.get_output()
        return output


@dataclass
class _Pairs:
    """The pairs of a routing map ``[n, E]``, in rows by expert and, for each expert, by token.

    Args:
        token: ``[r]``, the token of each row.
        cell: ``[r]``, ``token * E + expert`` of each row.
        rows: ``[r]``, all rows by token and, for each token, by expert.
        starts: ``[n + 1]``, where the rows of each token start among these, and where they end.
    """

    token: torch.Tensor
    cell: torch.Tensor
    rows: torch.Tensor
    starts: torch.Tensor

    def gather(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[n, h]`` -> ``[r, h]``: to each row its token."""
        return tokens.index_select(0, self.token)

    def sum(self, rows: torch.Tensor) -> torch.Tensor:
        """``[r, h]`` -> ``[n, h]``: to each token the sum of its rows, in fp32 and in the order of experts.

        One pass without atomic additions, which are slow in bf16 and add in an order that changes.
        """
        return F.embedding_bag(self.rows, rows.detach(), self.starts, mode="sum", include_last_offset=True)


@dataclass
class _Found:
    """What is known of the pairs before their number is.

    Args:
        places: ``[room, 2]``, expert and token of each row; those after the last pair mean nothing.
        before: ``[n * E + 1]``, pairs in the cells of the map before each cell, token by token.
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
