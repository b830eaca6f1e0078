"""Loss-free balancing: a bias on each expert's score that affects only the top-k (arXiv 2408.15664).

Shape letters: M modalities, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron_most.moe.expert_groups import ExpertGroups


class ExpertBias(torch.nn.Module):
    """The biases of one router, one for each modality and expert, and the load of the current step.

    ``values [M, E]``, fp32 in logical order, is saved in checkpoints. It is 0 outside a modality's choice. It affects
    which experts are chosen, never their probabilities, and has no gradient.
    """

    values: torch.Tensor

    def __init__(self, groups: ExpertGroups, update_rate: float, device: torch.device) -> None:
        super().__init__()
        self.update_rate = update_rate
        shape = (len(groups.choices), groups.num_experts)
        self.register_buffer("values", torch.zeros(shape, device=device))
        # Not a buffer: casting the model to bf16 would round the counts.
        self.step_pairs = torch.zeros(shape, dtype=torch.float64, device=device)
        self._physical_to_logical = torch.tensor(groups.physical_to_logical, device=device)
        self._modality_of_plane = torch.tensor([*range(shape[0]), 0], device=device)[:, None]
        self._is_allowed = groups.allowed().to(device)
        self._choice_sizes = self._is_allowed.sum(dim=1, keepdim=True)

    def by_plane(self) -> torch.Tensor:
        """``[M + 1, E]`` in physical order. The last row is for padding and has no effect."""
        return self.values[self._modality_of_plane, self._physical_to_logical]

    @torch.no_grad()
    def count(self, pairs: torch.Tensor) -> None:
        """Add the (token, expert) pairs ``[M, E]`` (physical order) of a micro-batch to the step's load."""
        self.step_pairs += pairs

    @torch.no_grad()
    def update(self, pairs: torch.Tensor) -> None:
        """Raise the bias of experts below the mean load of their modality's choice; lower it above the mean.

        Args:
            pairs: ``[M, E]`` (token, expert) pairs of the whole step on all ranks, physical order.
        """
        mean = pairs.sum(dim=1, keepdim=True) / self._choice_sizes
        step = ((mean - pairs).sign() * self._is_allowed).float() * self.update_rate
        self.values[:, self._physical_to_logical] += step

    def _apply(self, fn: Callable, recurse: bool = True) -> ExpertBias:
        """Move to another device with the model, but stay fp32: bf16 would round updates of 1e-3 away."""
        values = self.values
        super()._apply(fn, recurse)
        self.values = values.to(self.values.device)
        return self


def update_expert_biases(biases: Sequence[ExpertBias], group: dist.ProcessGroup) -> None:
    """Update the biases of this rank's routers from the load since the last call. Collective.

    Args:
        group: the ranks that hold other tokens of the same layers (tensor x context x data parallel).
    """
    if not biases:
        return
    pairs = torch.stack([bias.step_pairs for bias in biases])
    dist.all_reduce(pairs, group=group)
    for bias, whole in zip(biases, pairs, strict=True):
        bias.update(whole)
        bias.step_pairs.zero_()
