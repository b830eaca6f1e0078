"""The router: scores of the experts, and the choice among those that a token's modality may take.

Shape letters: n tokens, h hidden size, E experts, M modalities, K largest ``num_experts_per_tok``, R runs of
group-limited routing, L experts of a run. ``plane [n]`` is a token's modality, M where it is padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_most import MoSTConfig


class MoSTRouter(nn.Module):
    """Sends each token to experts of its modality's choice, and padding to none.

    ``weight`` is ``[E, h]``, or ``[M * E, h]`` with a matrix for each modality, one below the other.
    ``e_score_correction_bias [M, E]`` (arXiv 2408.15664) is part of the ranking, never of the gates.
    """

    def __init__(self, config: MoSTConfig) -> None:
        super().__init__()
        self.config = config
        groups, num_experts = config.expert_groups, config.n_routed_experts
        self.num_modalities = len(groups)
        self.max_top_k = max(group["num_experts_per_tok"] for group in groups)
        self.is_limited = any(group.get("n_group", 1) > 1 for group in groups)
        matrices = self.num_modalities if config.router_weights == "per_modality" else 1
        self.weight = nn.Parameter(torch.empty(matrices * num_experts, config.hidden_size))
        if config.use_expert_bias:
            bias = torch.zeros(self.num_modalities, num_experts, dtype=torch.float32)
            self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)
        # By device. No buffers: from_pretrained does not initialize those, and rounds them to the dtype of the model.
        self._tables: dict[torch.device, dict[str, torch.Tensor]] = {}

    def forward(self, hidden: torch.Tensor, plane: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``hidden [n, h]`` -> experts ``[n, K]``, best first, and gates ``[n, K]`` fp32, 0 beyond a token's top-k."""
        config, tables = self.config, self._tables_on(hidden.device)
        logits = F.linear(hidden.float(), self.weight.float())
        if config.router_weights == "per_modality":
            own = plane.clamp(max=self.num_modalities - 1)[:, None, None]
            logits = logits.unflatten(-1, (self.num_modalities, -1)).take_along_dim(own, dim=1)[:, 0]
        group_logits = logits + tables["mask"][plane]
        if config.scoring_func == "sigmoid":
            scores = torch.sigmoid(group_logits)
        else:
            scores = torch.softmax(group_logits if config.score_rule == "group" else logits, dim=-1)
        ranking = self._ranking(scores, group_logits, plane, tables)
        if self.is_limited:
            ranking = self._within_best_runs(ranking, plane, tables)
        experts = ranking.topk(self.max_top_k, dim=-1).indices
        gates = scores.gather(1, experts) * tables["is_taken"][plane]
        if config.norm_topk_prob:
            total = gates.sum(dim=-1, keepdim=True)
            gates = gates / (total + (total == 0))
        return experts, gates * config.routed_scaling_factor

    def _ranking(
        self, scores: torch.Tensor, group_logits: torch.Tensor, plane: torch.Tensor, tables: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """``[n, E]``, larger is better, -inf outside the choice. Logits have no ties where scores underflow."""
        if self.config.use_expert_bias:
            bias = self.e_score_correction_bias.float()
            return scores.detach() + torch.cat([bias, bias[:1]])[plane] + tables["mask"][plane]
        if self.config.scoring_func == "sigmoid" and self.is_limited:
            return scores.detach() + tables["mask"][plane]
        return group_logits.detach()

    def _within_best_runs(
        self, ranking: torch.Tensor, plane: torch.Tensor, tables: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Group-limited routing (arXiv 2405.04434, section 2.2.2): -inf outside a token's best runs of experts.

        DeepSeek-V2 ranks a run by its best expert, DeepSeek-V3, which has sigmoid scores, by the sum of its two best.
        """
        runs = tables["runs"]
        num_runs, run_length = runs.shape[1:]
        members = F.pad(ranking, (0, 1), value=float("-inf")).gather(1, runs[plane].flatten(1))
        num_best = min(2 if self.config.scoring_func == "sigmoid" else 1, run_length)
        best = members.view(-1, num_runs, run_length).topk(num_best).values
        second = best[..., 1:].masked_fill(best[..., 1:] == float("-inf"), 0.0)  # a run of one expert has none
        order = (best[..., 0] + second.sum(dim=-1)).argsort(dim=-1, descending=True)
        is_kept = torch.arange(num_runs, device=ranking.device) < tables["topk_group"][plane][:, None]
        is_kept = torch.zeros_like(is_kept).scatter(1, order, is_kept)
        return ranking.masked_fill(~F.pad(is_kept, (0, 1)).gather(1, tables["run_of"][plane]), float("-inf"))

    def _tables_on(self, device: torch.device) -> dict[str, torch.Tensor]:
        """What the configuration says of each plane (M modalities, then padding)."""
        if device not in self._tables:
            self._tables[device] = {name: table.to(device) for name, table in _make_tables(self.config).items()}
        return self._tables[device]


def _make_tables(config: MoSTConfig) -> dict[str, torch.Tensor]:
    """Tables with a row for each plane; padding has the limits of the first modality, and takes no expert.

    ``mask [M + 1, E]``: -inf outside the choice. ``is_taken [M + 1, K]``: 1 for the places of the top-k. ``runs
    [M + 1, R, L]``: experts of each run, E for none. ``run_of [M + 1, E]``: the run of each expert, R for none.
    ``topk_group [M + 1]``: how many runs are kept.
    """
    groups, num_experts = config.expert_groups, config.n_routed_experts
    num_planes = len(groups) + 1
    max_top_k = max(group["num_experts_per_tok"] for group in groups)
    num_runs = max(group.get("n_group", 1) for group in groups)
    run_length = max(len(group["experts"]) // group.get("n_group", 1) for group in groups)
    mask = torch.zeros(num_planes, num_experts)
    is_taken = torch.zeros(num_planes, max_top_k)
    runs = torch.full((num_planes, num_runs, run_length), num_experts)
    run_of = torch.full((num_planes, num_experts), num_runs)
    topk_group = torch.ones(num_planes, dtype=torch.long)
    for plane, group in enumerate([*groups, groups[0]]):
        experts = torch.tensor(group["experts"])
        own_runs = experts.view(group.get("n_group", 1), -1)
        runs[plane, : len(own_runs), : own_runs.shape[1]] = own_runs
        run_of[plane, experts] = torch.arange(len(own_runs)).repeat_interleave(own_runs.shape[1])
        topk_group[plane] = group.get("topk_group", 1)
        if plane < len(groups):
            mask[plane] = float("-inf")
            mask[plane, experts] = 0.0
            is_taken[plane, : group["num_experts_per_tok"]] = 1.0
    return {"mask": mask, "is_taken": is_taken, "runs": runs, "run_of": run_of, "topk_group": topk_group}
