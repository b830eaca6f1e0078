"""The choice: which experts a token is sent to, given how it ranks them.

Tables have a row for each plane (:mod:`megatron_most.moe.token_planes`): M modalities and padding.

Shape letters: n tokens, E experts (physical order), M modalities, K largest top_k, R runs, L experts of a run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_most.config import MoEConfig
from megatron_most.moe.expert_groups import ExpertGroups


class ExpertSelection:
    """Takes the ``top_k`` experts of each token's modality, from its best runs only where routing is group-limited.

    Nothing here depends on how many tokens a modality has, so that no count is brought to the host.
    """

    def __init__(self, moe: MoEConfig, groups: ExpertGroups, device: torch.device) -> None:
        self.max_top_k = moe.max_top_k
        top_k = torch.tensor([*groups.top_k, 0], device=device)
        self._is_taken = torch.arange(self.max_top_k, device=device) < top_k[:, None]
        self._runs: torch.Tensor | None = None
        if any(group.moe_router_num_groups > 1 for group in moe.groups):
            # DeepSeek-V2 ranks a run by its best expert, DeepSeek-V3, which has sigmoid scores, by its two best.
            self._experts_that_rank_a_run = 2 if moe.moe_router_score_function == "sigmoid" else 1
            self._runs, self._run_of = _runs(moe, groups)
            self._runs, self._run_of = self._runs.to(device), self._run_of.to(device)
            of_groups = [group.moe_router_group_topk for group in moe.groups]
            self._topk_group = torch.tensor([*of_groups, of_groups[0]], device=device)

    def __call__(self, ranking: torch.Tensor, plane: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose.

        Args:
            ranking: ``[n, E]``, larger is better, -inf where the token's modality may not choose.
            plane: ``[n]`` int64: the modality of a token, M where it is padding, which is sent nowhere.

        Returns:
            Experts ``[n, K]`` int64, best first, all of a row different, and ``[n, K]`` bool, which of them the token
            is sent to: the first ``top_k`` of its modality.
        """
        if self._runs is not None:
            ranking = self._within_best_runs(ranking, plane)
        experts = ranking.topk(self.max_top_k, dim=-1).indices
        return experts, self._is_taken[plane]

    def _within_best_runs(self, ranking: torch.Tensor, plane: torch.Tensor) -> torch.Tensor:
        """DeepSeek's group-limited routing (arXiv 2405.04434, section 2.2.2): -inf outside the best runs."""
        num_runs, run_length = self._runs.shape[1:]
        members = F.pad(ranking, (0, 1), value=float("-inf")).gather(1, self._runs[plane].flatten(1))
        num_best = min(self._experts_that_rank_a_run, run_length)
        best = members.view(-1, num_runs, run_length).topk(num_best).values
        # A run of a single expert has no second best; a run that does not exist has no best and stays at -inf.
        second = best[..., 1:].masked_fill(best[..., 1:] == float("-inf"), 0.0)
        run_ranking = best[..., 0] + second.sum(dim=-1)
        order = run_ranking.argsort(dim=-1, descending=True)
        places = torch.arange(num_runs, device=ranking.device)
        is_kept = places < self._topk_group[plane][:, None]
        is_kept_run = torch.zeros_like(is_kept).scatter(1, order, is_kept)
        is_kept_expert = F.pad(is_kept_run, (0, 1)).gather(1, self._run_of[plane])
        return ranking.masked_fill(~is_kept_expert, float("-inf"))


def _runs(moe: MoEConfig, groups: ExpertGroups) -> tuple[torch.Tensor, torch.Tensor]:
    """``[M + 1, R, L]`` experts of each run, E for none, and ``[M + 1, E]`` the run of each expert, R for none.

    Padding has the runs of the first modality.
    """
    physical = {expert: place for place, expert in enumerate(groups.physical_to_logical)}
    num_runs = max(group.moe_router_num_groups for group in moe.groups)
    run_length = max(
        len(choice) // group.moe_router_num_groups for choice, group in zip(groups.choices, moe.groups, strict=True)
    )
    runs = torch.full((len(moe.groups), num_runs, run_length), groups.num_experts)
    run_of = torch.full((len(moe.groups), groups.num_experts), num_runs)
    for modality, (choice, group) in enumerate(zip(groups.choices, moe.groups, strict=True)):
        length = len(choice) // group.moe_router_num_groups
        for place, expert in enumerate(choice):
            runs[modality, place // length, place % length] = physical[expert]
            run_of[modality, physical[expert]] = place // length
    return torch.cat([runs, runs[:1]]), torch.cat([run_of, run_of[:1]])
