"""Which experts belong to which modality, and in which order they are stored.

Logical order lists the groups one after another (all text experts, then all audio experts); it is what statistics and
reports use. Physical order is the order of router rows and expert weights; expert-parallel rank r holds the r-th
contiguous slice of it. ``interleaved`` spreads every group evenly over that order, so that each rank holds an equal
share of each group whatever the mix of modalities; ``contiguous`` keeps the logical order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_most.config import MoEConfig
from megatron_most.vocab import Modality


@dataclass(frozen=True)
class ExpertGroups:
    """The experts of every modality.

    Args:
        sizes: experts per group, indexed by :class:`Modality`.
        top_k: experts each token is sent to.
        physical_to_logical: for each physical position, the logical expert stored there.
    """

    sizes: tuple[int, ...]
    top_k: int
    physical_to_logical: tuple[int, ...]

    @classmethod
    def from_config(cls, config: MoEConfig) -> ExpertGroups:
        by_modality = {group.modality: group for group in config.groups}
        sizes = tuple(by_modality[modality.name.lower()].size for modality in Modality)
        order = _interleaved(sizes) if config.expert_order == "interleaved" else tuple(range(sum(sizes)))
        return cls(sizes=sizes, top_k=config.top_k, physical_to_logical=order)

    @property
    def num_experts(self) -> int:
        return sum(self.sizes)

    def logical_range(self, modality: int) -> range:
        """Logical experts of one group."""
        start = sum(self.sizes[:modality])
        return range(start, start + self.sizes[modality])

    def allowed(self) -> torch.Tensor:
        """``[modalities, experts]`` bool in physical order: may a token of that modality choose that expert."""
        logical = torch.tensor(self.physical_to_logical)
        rows = [
            (logical >= self.logical_range(modality).start) & (logical < self.logical_range(modality).stop)
            for modality in range(len(self.sizes))
        ]
        return torch.stack(rows)

    def to_logical(self, per_expert: torch.Tensor) -> torch.Tensor:
        """Reorder the last dimension from physical to logical order."""
        logical = torch.empty_like(per_expert)
        logical[..., torch.tensor(self.physical_to_logical)] = per_expert
        return logical


def _interleaved(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Logical experts in an order in which every group is spread evenly.

    Expert i of a group of size n sits at fraction (i + 1/2) / n of the order; equal fractions keep the groups' order.
    Every aligned slice that an expert-parallel size dividing all group sizes cuts out holds the same share of each.
    """
    placed = []
    start = 0
    for group, size in enumerate(sizes):
        placed += [((2 * i + 1) / (2 * size), group, start + i) for i in range(size)]
        start += size
    return tuple(logical for _, _, logical in sorted(placed))
