"""Routers and tokens for tests, and routing written token by token, straight from its definition.

Shape letters: s positions, b rows, n = s * b tokens, E experts (logical order here), h hidden size, M modalities.
"""

from __future__ import annotations

import copy
import functools

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_most.config import MoEConfig
from megatron_most.model.transformer_config import transformer_config
from megatron_most.moe.expert_groups import ExpertGroups
from megatron_most.moe.router import ModalityAwareRouter
from megatron_most.moe.token_planes import pack_planes
from tests.distributed.tiny import tiny_config

HIDDEN = 32


@functools.cache
def _megatron_config() -> TransformerConfig:
    return transformer_config(tiny_config())


def megatron_config(num_experts: int, expert_parallel_size: int = 1) -> TransformerConfig:
    config = copy.copy(_megatron_config())
    config.num_moe_experts, config.expert_model_parallel_size = num_experts, expert_parallel_size
    return config


def make_router(moe: MoEConfig, expert_parallel_size: int = 1, seed: int = 0) -> ModalityAwareRouter:
    """Process groups must exist; they need not have the expert-parallel size that gives the physical order."""
    config = megatron_config(moe.num_experts, expert_parallel_size)
    groups = ExpertGroups.from_config(moe, expert_parallel_size)
    router = ModalityAwareRouter(config, ProcessGroupCollection.use_mpu_process_groups(), moe=moe, groups=groups)
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(seed))
    router.set_layer_number(2)
    return router


def make_tokens(
    seed: int = 0,
    rows: int = 2,
    length: int = 24,
    shares: tuple[float, ...] = (0.6, 0.4),
    padding: int = 4,
    hidden_size: int = HIDDEN,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states ``[s, b, h]``; modality ``[b, s]`` in the given shares; is_padding ``[b, s]``, at the last end."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(length, rows, hidden_size, generator=generator)
    modality = torch.multinomial(torch.tensor(shares), rows * length, replacement=True, generator=generator)
    is_padding = torch.zeros(rows, length, dtype=torch.bool)
    is_padding[-1, length - padding :] = True
    return hidden, modality.view(rows, length), is_padding


def route(
    router: ModalityAwareRouter, hidden: torch.Tensor, modality: torch.Tensor, is_padding: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and routing map ``[n, E]`` in physical order."""
    # The MoE layer hands the planes on transposed.
    return router(hidden, pack_planes(modality, is_padding, len(router.groups.choices)).transpose(0, 1))


def flat(per_position: torch.Tensor) -> torch.Tensor:
    """``[b, s]`` -> ``[n]`` in the order of tokens."""
    return per_position.transpose(0, 1).reshape(-1)


def reference_logits(
    moe: MoEConfig, weight: torch.Tensor, hidden: torch.Tensor, modality: torch.Tensor
) -> torch.Tensor:
    """``[n, E]`` from the router's weight and ``modality [n]``."""
    tokens = hidden.reshape(-1, HIDDEN)
    if moe.router_weights == "shared":
        return tokens @ weight.t()
    return torch.stack([weight[m] @ token for token, m in zip(tokens, modality.tolist(), strict=True)])


def reference_routing(
    moe: MoEConfig,
    logits: torch.Tensor,
    modality: torch.Tensor,
    is_valid: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Probabilities, routing map and the distribution inside the choice, ``[n, E]`` each, token by token."""
    choices = ExpertGroups.from_config(moe).choices
    probs, routing_map, distribution = (torch.zeros_like(logits) for _ in range(3))
    for token, m in enumerate(modality.tolist()):
        choice, group = list(choices[m]), moe.groups[m]
        inside = logits[token, choice]
        if moe.moe_router_score_function == "sigmoid":
            scores = torch.sigmoid(inside)
            distribution[token, choice] = scores / scores.sum()
        else:
            distribution[token, choice] = torch.softmax(inside, dim=0)
            whole = torch.softmax(logits[token], dim=0)[choice]
            scores = distribution[token, choice] if moe.score_rule == "group" else whole
        if not is_valid[token]:
            continue
        ranking = (inside if moe.moe_router_score_function == "softmax" and bias is None else scores).detach().clone()
        if bias is not None:
            ranking += bias[m, choice]
        runs = ranking.view(group.moe_router_num_groups, -1)
        best = (
            runs.sort(dim=1, descending=True)
            .values[:, : 2 if moe.moe_router_score_function == "sigmoid" else 1]
            .sum(dim=1)
        )
        for run in best.sort(descending=True).indices[group.moe_router_group_topk :].tolist():
            runs[run] = -float("inf")
        chosen = ranking.sort(descending=True).indices[: group.moe_router_topk].tolist()
        taken = scores[chosen]
        if moe.norm_topk_prob:
            taken = taken / taken.sum()
        experts = [choice[i] for i in chosen]
        probs[token, experts] = taken * moe.moe_router_topk_scaling_factor
        routing_map[token, experts] = 1
    return probs, routing_map.bool(), distribution


def reference_losses(
    moe: MoEConfig,
    weight: torch.Tensor,
    logits: torch.Tensor,
    routing_map: torch.Tensor,
    distribution: torch.Tensor,
    modality: torch.Tensor,
    is_valid: torch.Tensor,
    rows: int,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The loss of each name, summed over tokens before its coefficient, and the weighted sum of all."""
    choices = ExpertGroups.from_config(moe).choices
    row = torch.arange(len(modality)) % rows
    sums = {name: torch.zeros(()) for name in ("balance_loss", "z_loss", "orthogonality_loss")}
    total = torch.zeros(())

    def add(name: str, value: torch.Tensor, coefficient: float) -> None:
        nonlocal total
        sums[name] = sums[name] + value
        total = total + coefficient * value

    for m, group in enumerate(moe.groups):
        choice = list(choices[m])
        mine = (modality == m) & is_valid
        sequences = (
            [row == r for r in range(rows)] if moe.moe_router_load_balancing_type == "seq_aux_loss" else [row >= 0]
        )
        for sequence in sequences:
            tokens = mine & sequence
            if moe.moe_router_load_balancing_type != "none" and tokens.any():
                fraction = routing_map[tokens][:, choice].float().sum(dim=0) / (group.moe_router_topk * tokens.sum())
                mean_prob = distribution[tokens][:, choice].mean(dim=0)
                value = tokens.sum() * len(choice) * (fraction * mean_prob).sum()
                add(
                    "balance_loss",
                    value,
                    moe.moe_aux_loss_coeff if group.moe_aux_loss_coeff is None else group.moe_aux_loss_coeff,
                )
        z_coefficient = moe.moe_z_loss_coeff if group.moe_z_loss_coeff is None else group.moe_z_loss_coeff
        seen = logits[mine] if moe.score_rule == "all" else logits[mine][:, choice]
        add("z_loss", torch.logsumexp(seen, dim=1).square().sum(), z_coefficient)
        rows_of_choice = (weight if weight.dim() == 2 else weight[m])[choice]
        cosines = torch.nn.functional.cosine_similarity(rows_of_choice[:, None], rows_of_choice[None], dim=-1)
        others = cosines.square().sum() - cosines.diagonal().square().sum()
        add("orthogonality_loss", mine.sum() * others, moe.orthogonality_coeff)
    return sums, total
