"""The modality-aware router: a token chooses only among the experts of its own modality.

Shape letters: s positions (of this rank), b micro-batch rows, n = s * b tokens, E experts (in physical order unless
stated otherwise), h hidden size, M modalities.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import router_gating_linear
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_most.config import MoEConfig
from megatron_most.moe.balance import sum_by_modality
from megatron_most.moe.expert_bias import ExpertBias, update_expert_biases
from megatron_most.moe.expert_groups import ExpertGroups
from megatron_most.moe.expert_selection import ExpertSelection
from megatron_most.moe.losses import RouterLosses, TokenSums, z_loss
from megatron_most.moe.routing_statistics import RoutingStatistics
from megatron_most.moe.scores import choice_distribution, expert_scores, gates
from megatron_most.moe.token_planes import unpack_planes

if TYPE_CHECKING:
    from megatron_most.moe.routing_kernel import RoutingKernel


class ModalityAwareRouter(Router):
    """Megatron's router, restricted to the experts that the token's modality may choose.

    Logits outside the choice are masked before the scores and the top-k, so that all modalities share one dispatch and
    one set of experts. Padding is routed to no expert. A token's modality arrives in ``padding_mask``, which holds the
    planes of :mod:`megatron_most.moe.token_planes`; tables have one row for each plane.

    ``weight`` is ``[E, h]`` or, with a matrix for each modality, ``[M, E, h]``, in logical order. Its rows are permuted
    to physical order when logits are computed.

    Args:
        moe: the routing options.
        groups: the experts of all modalities.
    """

    weight: torch.nn.Parameter

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        *,
        moe: MoEConfig,
        groups: ExpertGroups,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.moe, self.groups = moe, groups
        if moe.router_weights == "per_modality":
            self.weight = torch.nn.Parameter(self.weight.new_empty(len(groups.choices), *self.weight.shape))
            self.reset_parameters()
        # Tables are not buffers: casting the model to bf16 would round coefficients and counts.
        device = torch.device(torch.cuda.current_device())
        order = groups.physical_to_logical
        self._row_order = None if order == tuple(range(len(order))) else torch.tensor(order, device=device)
        self._mask = torch.zeros(len(groups.choices) + 1, len(order), device=device)
        self._mask[:-1].masked_fill_(~groups.allowed().to(device), float("-inf"))
        self._select = ExpertSelection(moe, groups, device)
        # Logits rank experts as scores do, without ties where scores underflow. The sum of a span's best two, which
        # group-limited routing with sigmoid scores takes, needs the scores themselves.
        self._ranks_by_score = moe.moe_router_score_function == "sigmoid" and moe.is_group_limited
        self.expert_bias = None
        if moe.moe_router_bias_update_rate > 0:
            self.expert_bias = ExpertBias(groups, moe.moe_router_bias_update_rate, device)
        self.losses = RouterLosses(moe, groups, pg_collection, device)
        self.statistics = RoutingStatistics(groups, device)
        self._kernel: RoutingKernel | None = None

    def forward(
        self, input: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``input [s, b, h]`` and planes ``[s, (M + 1) * b]`` -> probs ``[n, E]`` and routing map ``[n, E]`` bool."""
        return self.routing(self.gating(input), padding_mask)

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """``[s, b, h]`` -> logits ``[s, b, E]`` fp32; ``[s, b, M * E]`` with a matrix for each modality."""
        weight = self.weight if self._row_order is None else self.weight.index_select(-2, self._row_order)
        return router_gating_linear(input, weight.flatten(0, -2), None, torch.float32)

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The result of :meth:`gating` and planes ``[s, (M + 1) * b]`` -> probs and routing map, ``[n, E]`` each."""
        planes = self._checked(padding_mask, logits.shape[:2])
        # Count and add losses only in passes that have a backward: not in evaluation, and once in a recomputed layer,
        # whose first forward runs without gradients.
        counts = self.training and torch.is_grad_enabled()
        route = self._by_operators if self._kernel is None else self._by_kernel
        probs, routing_map, sums = route(logits, planes, counts)
        if sums is not None:
            if self.expert_bias is not None:
                self.expert_bias.count(sums.pairs.sum(dim=0))
            losses = self.losses(sums, self.weight.view(-1, *self.weight.shape[-2:]))
            for name, value in losses.items():
                self.statistics.add_loss(name, value)
            probs = self.losses.attach(probs, losses)
        return probs, routing_map

    def use_kernel(self, is_wanted: bool) -> None:
        """Route by one Triton kernel each way instead of torch's operators, or not. Needs Triton and a GPU."""
        self._kernel = None
        if is_wanted:
            from megatron_most.moe.routing_kernel import RoutingKernel

            self._kernel = RoutingKernel(self.moe, self.groups, self._mask)

    def _by_operators(
        self, logits: torch.Tensor, planes: torch.Tensor, counts: bool
    ) -> tuple[torch.Tensor, torch.Tensor, TokenSums | None]:
        """Probs and routing map, and if the pass ``counts``, sums over tokens, which are also added to statistics."""
        plane, membership = unpack_planes(planes, len(self.groups.choices))
        num_sequences, logits = self._num_sequences(logits), self._own_logits(logits, plane)
        group_logits = logits + self._mask[plane]
        scores = expert_scores(logits, group_logits, self.moe)
        experts, is_taken = self._select(self._ranking(scores, group_logits, plane), plane)
        routing_map = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, experts, is_taken)
        probs = gates(scores, routing_map, experts, is_taken, self.moe)
        if not counts:
            return probs, routing_map, None
        group_probs = choice_distribution(scores, group_logits, self.moe)
        seen = group_logits if self.moe.score_rule == "group" else logits
        sums = TokenSums(
            self.statistics.count(routing_map, scores, group_probs, membership, num_sequences),
            lambda: sum_by_modality(membership, group_probs, num_sequences),
            lambda: z_loss(seen, membership),
            lambda: membership.sum(dim=1),
        )
        return probs, routing_map, sums

    def _by_kernel(
        self, logits: torch.Tensor, planes: torch.Tensor, counts: bool
    ) -> tuple[torch.Tensor, torch.Tensor, TokenSums | None]:
        """As :meth:`_by_operators`."""
        assert self._kernel is not None
        bias = None if self.expert_bias is None else self.expert_bias.by_plane()
        routed = self._kernel(logits, planes, bias, self._num_sequences(logits))
        if not counts:
            return routed.probs, routed.routing_map, None
        sums = TokenSums(
            self.statistics.add(routed.counted),
            lambda: routed.prob_sums,
            lambda: routed.squared_logsumexp.sum(dim=0),
            lambda: routed.counted[..., -1].sum(dim=0),
        )
        return routed.probs, routed.routing_map, sums

    def _num_sequences(self, logits: torch.Tensor) -> int:
        """How many sequences of a micro-batch are balanced separately: its rows, or 1 for all tokens together."""
        return logits.shape[1] if self.moe.moe_router_load_balancing_type == "seq_aux_loss" else 1

    def _checked(self, planes: torch.Tensor | None, token_shape: torch.Size) -> torch.Tensor:
        """The planes of tokens ``[s, b]``."""
        if planes is None:
            raise RuntimeError(f"layer {self.layer_number}: padding_mask is None; the router needs the modality planes")
        num_modalities, (positions, rows) = len(self.groups.choices), token_shape
        if planes.shape != (positions, (num_modalities + 1) * rows):
            raise RuntimeError(
                f"layer {self.layer_number}: planes of shape {tuple(planes.shape)} for {num_modalities} modalities and"
                f" tokens of shape {tuple(token_shape)}"
            )
        return planes

    def _own_logits(self, logits: torch.Tensor, plane: torch.Tensor) -> torch.Tensor:
        """``[n, E]``, the logits of each token's own matrix where every modality has one."""
        num_experts = self.groups.num_experts
        if self.moe.router_weights == "shared":
            return logits.view(-1, num_experts)
        num_tokens, num_modalities = plane.numel(), len(self.groups.choices)
        own = torch.arange(num_tokens, device=plane.device) * num_modalities + plane.clamp(max=num_modalities - 1)
        return logits.view(-1, num_experts).index_select(0, own)

    def _ranking(self, scores: torch.Tensor, group_logits: torch.Tensor, plane: torch.Tensor) -> torch.Tensor:
        """``[n, E]``, what the top-k compares; -inf outside the token's choice."""
        if self.expert_bias is not None:
            return scores.detach() + (self.expert_bias.by_plane() + self._mask)[plane]
        if self._ranks_by_score:
            return scores.detach() + self._mask[plane]
        return group_logits.detach()


def end_routing_step(chunks: Iterable[torch.nn.Module]) -> None:
    """Update the expert biases after an optimizer step, and reset the loads of the step. Collective.

    A frozen router keeps its bias.

    Args:
        chunks: this rank's model chunks, wrapped or not.
    """
    routers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, ModalityAwareRouter)]
    learning = [router for router in routers if router.weight.requires_grad]
    biases = [router.expert_bias for router in learning if router.expert_bias is not None]
    if biases:
        update_expert_biases(biases, routers[0].tp_dp_cp_group)
    for router in routers:
        router.losses.end_step()


def discard_routing_step(chunks: Iterable[torch.nn.Module]) -> None:
    """Reset the loads of the step, leave the expert biases as they are, and reset the statistics."""
    for router in (module for chunk in chunks for module in chunk.modules() if isinstance(module, ModalityAwareRouter)):
        if router.expert_bias is not None:
            router.expert_bias.step_pairs.zero_()
        router.losses.end_step()
        router.statistics.reset()
