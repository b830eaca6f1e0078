"""The auxiliary losses of the router, computed for each modality and weighted by that modality's coefficient.

Shape letters: n tokens, B sequences, E experts, h hidden size, M modalities, W matrices of the router (1, or M: one per
modality).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_most.config import MoEConfig
from megatron_most.moe.balance import BalanceLoss
from megatron_most.moe.expert_groups import ExpertGroups


def z_loss(logits: torch.Tensor, membership: torch.Tensor) -> torch.Tensor:
    """ST-MoE's z-loss (arXiv 2202.08906, eq. 5) summed over the tokens of each modality.

    Args:
        logits: ``[n, E]`` fp32, the input of the score function; entries of -inf have no effect.
        membership: ``[M, n]``, 1 where the token is valid and of that modality, else 0.

    Returns:
        ``[M]``.
    """
    return membership @ torch.logsumexp(logits, dim=-1).square()


def orthogonality(weight: torch.Tensor, is_pair: torch.Tensor) -> torch.Tensor:
    """How far the router's rows are from orthogonal within each choice: sum of squared cosines over pairs of rows.

    This is the router orthogonalization loss of the ERNIE 4.5 technical report. Experts with similar rows get similar
    tokens.

    Args:
        weight: ``[W, E, h]``.
        is_pair: ``[M, E, E]``, 1 for two different experts of the modality's choice, else 0.

    Returns:
        ``[M]`` fp32.
    """
    rows = F.normalize(weight.float(), dim=-1)
    return ((rows @ rows.mT).square() * is_pair).sum(dim=(1, 2))


@dataclass(frozen=True)
class TokenSums:
    """Sums over the tokens of a micro-batch on this rank. Those that not every configuration needs are functions.

    pairs: ``[B, M, E]``, (token, expert) pairs.
    probs: ``[B, M, E]``, the distribution over each token's choice, 0 outside.
    squared_logsumexp: ``[M]``, see :func:`z_loss`.
    tokens: ``[M]``, valid tokens.
    """

    pairs: torch.Tensor
    probs: Callable[[], torch.Tensor]
    squared_logsumexp: Callable[[], torch.Tensor]
    tokens: Callable[[], torch.Tensor]


class RouterLosses:
    """The auxiliary losses of one router that its configuration enables, with their coefficients."""

    def __init__(
        self, moe: MoEConfig, groups: ExpertGroups, pg_collection: ProcessGroupCollection, device: torch.device
    ) -> None:
        def coefficients_of(name: str) -> torch.Tensor:
            """``[M]``: the group's coefficient, or the layer's where the group has none."""
            default = getattr(moe, name)
            values = [getattr(group, name) for group in moe.groups]
            return torch.tensor([default if value is None else value for value in values], device=device)

        self._coefficients: dict[str, torch.Tensor] = {}
        if moe.moe_router_load_balancing_type != "none":
            self._coefficients["balance_loss"] = coefficients_of("moe_aux_loss_coeff")
            is_pooled = moe.balance_scope == "pooled"
            ranks = (pg_collection.tp_cp, pg_collection.tp_dp_cp)
            self._balance = BalanceLoss(moe.moe_router_load_balancing_type, is_pooled, groups, device, *ranks)
        z_coefficients = coefficients_of("moe_z_loss_coeff")
        if z_coefficients.any():
            self._coefficients["z_loss"] = z_coefficients
        if moe.orthogonality_coeff:
            coefficients = torch.full((len(moe.groups),), moe.orthogonality_coeff, device=device)
            self._coefficients["orthogonality_loss"] = coefficients
            is_choice = torch.zeros(len(groups.choices), groups.num_experts, device=device)
            for modality, choice in enumerate(groups.choices):
                is_choice[modality, list(choice)] = 1
            self._is_pair = is_choice[:, :, None] * is_choice[:, None, :]
            self._is_pair.diagonal(dim1=1, dim2=2).zero_()

    def __call__(self, sums: TokenSums, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Name -> ``[M]``: each loss summed over this rank's tokens, without its coefficient.

        Args:
            weight: ``[W, E, h]``, the router's rows in logical order.
        """
        losses = {}
        if "balance_loss" in self._coefficients:
            losses["balance_loss"] = self._balance(sums.probs(), sums.pairs)
        if "z_loss" in self._coefficients:
            losses["z_loss"] = sums.squared_logsumexp()
        if "orthogonality_loss" in self._coefficients:
            # A sum over tokens like the others, so that dividing by the tokens gives the same in every layout.
            losses["orthogonality_loss"] = orthogonality(weight, self._is_pair) * sums.tokens()
        return losses

    def attach(self, probs: torch.Tensor, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return ``probs`` unchanged; its backward pass adds the gradient of the weighted sum of ``losses``.

        Like the language-model loss, each is a sum over tokens; finalize_model_grads divides their gradients by the
        number of targets.
        """
        if not losses:
            return probs
        first, *others = (value.dot(self._coefficients[name]) for name, value in losses.items())
        return MoEAuxLossAutoScaler.apply(probs, sum(others, first))

    def end_step(self) -> None:
        if "balance_loss" in self._coefficients:
            self._balance.end_step()
