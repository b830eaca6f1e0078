"""The load-balancing loss, taken inside each modality's choice of experts.

Shape letters: b micro-batch rows, n tokens (of this rank), B sequences that are balanced separately (the b rows, or 1
for all tokens together), E experts (physical order), M modalities.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_most.moe.expert_groups import ExpertGroups


def sum_by_modality(membership: torch.Tensor, per_token: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """Sum ``per_token [n, E]`` over the tokens of each sequence and modality.

    Args:
        membership: ``[M, n]`` fp32, 1 where the token is valid and of that modality, else 0.
        num_sequences: B; token i belongs to sequence ``i % B``.

    Returns:
        ``[B, M, E]`` fp32. Counts are exact up to 2^24.
    """
    by_sequence = membership.view(membership.shape[0], -1, num_sequences).permute(2, 0, 1)
    return by_sequence.bmm(per_token.view(-1, num_sequences, per_token.shape[1]).transpose(0, 1))


class BalanceLoss:
    """The Switch load-balancing loss (arXiv 2101.03961, eq. 4) of each modality.

    For a modality with T valid tokens and a choice of E_m experts, the loss is ``E_m * sum_i f_i * P_i``. ``f_i`` is
    the fraction of the modality's (token, expert) pairs that go to expert i, and ``P_i`` the mean probability of expert
    i over the T tokens. An even load gives 1. The loss is multiplied by T, so that every token counts once whatever its
    modality; as a sum over tokens it can be added up over ranks and micro-batches.

    Kinds differ in the tokens over which ``f`` is computed:

    - ``aux_loss``: those of the micro-batch;
    - ``seq_aux_loss``: those of the row (DeepSeek-V2, arXiv 2405.04434, section 2.1.3);
    - ``global_aux_loss``: those of all data-parallel ranks, in all micro-batches of the step so far (arXiv 2501.11873).

    With ``is_pooled``, ``f`` and the number of experts cover all modalities together, as in a router without
    modalities; the sum over modalities is then the loss of all tokens. A modality with few tokens hardly counts in it.

    Args:
        row_group: ranks that hold other tokens of the same rows (tensor x context parallel).
        step_group: ``row_group`` and the ranks that hold other rows (x data parallel).
    """

    def __init__(
        self,
        kind: str,
        is_pooled: bool,
        groups: ExpertGroups,
        device: torch.device,
        row_group: dist.ProcessGroup,
        step_group: dist.ProcessGroup,
    ) -> None:
        self.kind = kind
        self.is_pooled = is_pooled
        sizes = [groups.num_experts if is_pooled else len(choice) for choice in groups.choices]
        self._choice_sizes = torch.tensor(sizes, dtype=torch.float32, device=device)
        self._count_group = step_group if kind == "global_aux_loss" else row_group
        self._step_pairs = torch.zeros(1, len(groups.choices), groups.num_experts, dtype=torch.float64, device=device)

    def __call__(self, prob_sums: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        """Collective over the ranks whose tokens ``f`` covers.

        Args:
            prob_sums: ``[B, M, E]``, the distribution over the choice of each of this rank's tokens, 0 outside, summed
                over tokens. B is 1 unless the kind is ``seq_aux_loss``.
            pairs: ``[B, M, E]``, this rank's (token, expert) pairs.

        Returns:
            ``[M]``: the modality's loss, summed over this rank's valid tokens.
        """
        if self._count_group.size() > 1:
            pairs = pairs.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(pairs, group=self._count_group)
        if self.kind == "global_aux_loss":
            self._step_pairs += pairs
            pairs = self._step_pairs
        if self.is_pooled:
            pairs = pairs.sum(dim=1, keepdim=True)
        fractions = (pairs / pairs.sum(dim=-1, keepdim=True).clamp(min=1)).float()
        return (prob_sums * fractions).sum(dim=(0, 2)) * self._choice_sizes

    def end_step(self) -> None:
        """Reset what ``global_aux_loss`` accumulates over the micro-batches of a step."""
        self._step_pairs.zero_()
