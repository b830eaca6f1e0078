"""The all-to-all dispatcher for tokens with different numbers of experts: padding has none, a modality its own top-k.

Shape letters: n tokens of this rank, E experts in physical order, h hidden size, r (token, expert) pairs of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
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
    for it, or asks for it once more when a capacity is set. Here n x max top-k rows are laid out without asking, and
    cut to the pairs that exist where the dispatcher waits for the counts of all experts anyway: before it sends.
    Rows after the last pair hold the first token once more, or nothing of meaning, and are never sent.
    """

    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        """Routing map ``[n, E]`` bool -> tokens of each local expert; the host knows all counts before it sends."""
        tokens_per_expert = super().preprocess(routing_map)
        self._maybe_update_cuda_sync_point("before_ep_alltoall")
        return tokens_per_expert

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states ``[..., h]``, map and probs ``[n, E]`` -> rows ``[n * max top-k, h]`` by expert, and probs."""
        self.hidden_shape, self.probs, self.routing_map = hidden_states.shape, probs, routing_map
        tokens = hidden_states.view(-1, hidden_states.shape[-1])
        self.hidden_shape_before_permute = tokens.shape
        self.tokens_per_expert = self.preprocess(routing_map)
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(hidden_states)
        # Here the copies to the host start; waiting for them is left to token_dispatch.
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_permutation_1", self.tokens_per_expert)
        if self.config.moe_permute_fusion:
            rows, row_probs, self.reversed_local_input_permutation_mapping, *_ = permute(
                tokens, routing_map, probs=probs, num_out_tokens=self.num_out_tokens, fused=True
            )
            return rows, row_probs
        pairs = _pairs_by_expert(routing_map, self.num_out_tokens)
        token_of_row = pairs.remainder(tokens.shape[0])
        self.reversed_local_input_permutation_mapping = token_of_row
        return tokens.index_select(0, token_of_row), probs.T.contiguous().view(-1).index_select(0, pairs)

    def token_dispatch(
        self, permutated_local_input_tokens: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Send the rows that hold a pair: ``[r, h]`` and ``[r]``."""
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_ep_alltoall", self.tokens_per_expert)
        # On one rank there are no splits: all its pairs are for its own experts.
        num_pairs = int((self.tokens_per_expert if self.input_splits is None else self.input_splits).sum())
        if not self.config.moe_permute_fusion:  # the fused kernel's mapping has a place for each expert, not for rows
            self.reversed_local_input_permutation_mapping = self.reversed_local_input_permutation_mapping[:num_pairs]
        return super().token_dispatch(permutated_local_input_tokens[:num_pairs], permuted_probs[:num_pairs])

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


def _pairs_by_expert(routing_map: torch.Tensor, room: int) -> torch.Tensor:
    """Routing map ``[n, E]`` -> ``expert * n + token`` of each pair, ascending, ``[room]``; 0 after the last pair."""
    return routing_map.T.contiguous().view(-1).nonzero_static(size=room, fill_value=0).view(-1)
