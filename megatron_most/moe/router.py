"""The modality-aware router: a token may choose only among the experts of its own group.

Shape letters: s positions (of this rank), b micro-batch rows, n = s * b tokens, E experts (physical order).
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_most.config import MoEConfig
from megatron_most.moe.balance import group_balance_loss
from megatron_most.moe.expert_groups import ExpertGroups
from megatron_most.moe.statistics import RoutingStatistics
from megatron_most.moe.token_planes import unpack_planes


class ModalityAwareRouter(TopKRouter):
    """Megatron's top-k router with the choice confined to the token's expert group.

    Out-of-group logits are masked before softmax and top-k, so that one dispatch and one set of experts serve all
    groups. Padding is sent to no expert. Everything the router needs of a token comes in ``padding_mask``, which holds
    the planes of :mod:`megatron_most.moe.token_planes`.

    Args:
        moe: the options; ``score_rule`` ``group`` takes the softmax inside the group, ``all`` over all experts
            (as the reference implementation of MoST does).
    """

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None, *, moe: MoEConfig
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.moe = moe
        self.groups = ExpertGroups.from_config(moe, config.expert_model_parallel_size)
        device = torch.device(torch.cuda.current_device())
        self.register_buffer("allowed", self.groups.allowed().to(device), persistent=False)
        self.register_buffer(
            "group_sizes", torch.tensor([len(c) for c in self.groups.choices], device=device), persistent=False
        )
        self.statistics = RoutingStatistics(self.groups, device)

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``logits [s, b, E]`` and planes ``[s, 2b]`` -> probs ``[n, E]`` and routing map ``[n, E]`` bool."""
        if padding_mask is None:
            raise RuntimeError(f"layer {self.layer_number}: no modality reached the router")
        modality, is_padding = unpack_planes(padding_mask, len(self.groups.choices))
        if modality.shape != logits.shape[:2]:
            raise RuntimeError(
                f"layer {self.layer_number}: modality of shape {tuple(modality.shape)} for tokens of shape"
                f" {tuple(logits.shape[:2])}"
            )
        num_sequences = logits.shape[1]
        logits = logits.reshape(-1, self.groups.num_experts)
        modality, is_padding = modality.reshape(-1), is_padding.reshape(-1)
        is_valid = ~is_padding

        group_logits = logits.masked_fill(~self.allowed[modality], float("-inf"))
        logits_for_scores = group_logits if self.moe.score_rule == "group" else logits
        if self.config.moe_z_loss_coeff is not None and self.training and torch.is_grad_enabled():
            group_logits = self._attach_z_loss(group_logits, logits_for_scores, is_valid)
        group_probs = torch.softmax(group_logits, dim=-1, dtype=torch.float32)
        scores = group_probs if self.moe.score_rule == "group" else torch.softmax(logits, dim=-1, dtype=torch.float32)

        chosen = group_logits.topk(max(self.groups.top_k), dim=-1).indices
        routing_map = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, chosen, True)
        routing_map &= is_valid[:, None]
        probs = scores * routing_map
        if self.moe.normalize_top_k:
            probs = probs / probs.sum(dim=-1, keepdim=True).clamp(min=1e-20)
        probs = probs * self.moe.routed_scaling_factor

        # In training, statistics and losses belong to the pass that has a backward: not to evaluation, and only to the
        # second of the two forwards of a recomputed layer.
        if self.training and torch.is_grad_enabled():
            self.statistics.count(routing_map, scores, group_probs, modality, is_valid)
            if self.moe.balance_loss != "none":
                probs = self._attach_balance_loss(probs, group_probs, routing_map, modality, is_valid, num_sequences)
        return probs.type_as(logits), routing_map

    def _attach_balance_loss(
        self,
        probs: torch.Tensor,
        group_probs: torch.Tensor,
        routing_map: torch.Tensor,
        modality: torch.Tensor,
        is_valid: torch.Tensor,
        num_sequences: int,
    ) -> torch.Tensor:
        tokens = torch.arange(modality.numel(), device=modality.device)
        per_sequence = self.moe.balance_loss == "seq_aux_loss"
        loss = group_balance_loss(
            group_probs,
            routing_map,
            modality,
            sequence=tokens % num_sequences if per_sequence else torch.zeros_like(tokens),
            is_valid=is_valid,
            group_sizes=self.group_sizes,
            num_sequences=num_sequences if per_sequence else 1,
            top_k=max(self.groups.top_k),
            reduce_group=self.tp_cp_group,
        )
        self.statistics.add_loss("balance_loss", loss)
        # A sum over tokens, as the language-model loss is: finalize_model_grads divides both by the loss tokens.
        return MoEAuxLossAutoScaler.apply(probs, loss * self.moe.balance_coeff)

    def _attach_z_loss(
        self, group_logits: torch.Tensor, logits_for_scores: torch.Tensor, is_valid: torch.Tensor
    ) -> torch.Tensor:
        """ST-MoE's z-loss (arXiv 2202.08906, eq. 5) on the logits the softmax sees, summed over valid tokens."""
        log_z = torch.logsumexp(logits_for_scores.float(), dim=-1)
        loss = (log_z.square() * is_valid).sum()
        return MoEAuxLossAutoScaler.apply(group_logits, loss * self.config.moe_z_loss_coeff)
