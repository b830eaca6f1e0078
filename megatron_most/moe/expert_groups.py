"""Which experts a modality may choose, and where each expert is stored.

Experts come in pools: one for each modality, and one of common experts that several modalities may choose.

Logical order is the base model's numbering or, where groups are given by size, the pools one after another. Weights,
checkpoints, statistics, and reports use it. Physical order exists only in the running job: expert-parallel rank r
computes the r-th slice of it. With ``interleaved``, every rank has an equal share of every pool, whatever the mix of
modalities; with ``contiguous``, a slice of the logical order. A rank's experts are always sorted by pool, so that the
tokens of a pool are contiguous for the grouped matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_most.config import MoEConfig, number_experts

COMMON = "common"
"""Name of the pool of common experts."""


@dataclass(frozen=True)
class ExpertGroups:
    """The experts of all modalities.

    Args:
        pools: name -> logical experts, a partition: each modality's own pool, in the order of modalities, then
            ``common``. Empty pools are left out.
        choices: for each modality, the logical experts that its tokens may choose: its own, then the common ones.
        top_k: for each modality, the number of experts per token.
        physical_to_logical: for each physical position, the logical expert stored there.
        expert_parallel_size: ranks that the physical order is divided among.
    """

    pools: dict[str, tuple[int, ...]]
    choices: tuple[tuple[int, ...], ...]
    top_k: tuple[int, ...]
    physical_to_logical: tuple[int, ...]
    expert_parallel_size: int

    @classmethod
    def from_config(cls, config: MoEConfig, expert_parallel_size: int = 1) -> ExpertGroups:
        pools = _pools(config)
        common = pools.get(COMMON, ())
        return cls(
            pools=pools,
            choices=tuple(
                pools.get(group.modality, ()) + (common if config.num_common(group.modality) else ())
                for group in config.groups
            ),
            top_k=tuple(group.moe_router_topk for group in config.groups),
            physical_to_logical=_physical_order(list(pools.values()), config.expert_order, expert_parallel_size),
            expert_parallel_size=expert_parallel_size,
        )

    @property
    def num_experts(self) -> int:
        return len(self.physical_to_logical)

    def allowed(self) -> torch.Tensor:
        """``[modalities, experts]`` bool in physical order: True where the modality may choose the expert."""
        logical = torch.zeros(len(self.choices), self.num_experts, dtype=torch.bool)
        for modality, experts in enumerate(self.choices):
            logical[modality, list(experts)] = True
        return logical[:, list(self.physical_to_logical)]

    def to_logical(self, per_expert: torch.Tensor) -> torch.Tensor:
        """Reorder the last dimension from physical to logical order."""
        logical = torch.empty_like(per_expert)
        logical[..., torch.tensor(self.physical_to_logical)] = per_expert
        return logical

    def local_experts(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Pool -> logical experts of expert-parallel ``rank``, in physical order. Pools may be empty."""
        size = self.num_experts // self.expert_parallel_size
        mine = self.physical_to_logical[rank * size : (rank + 1) * size]
        return {name: tuple(expert for expert in mine if expert in pool) for name, pool in self.pools.items()}


def _pools(config: MoEConfig) -> dict[str, tuple[int, ...]]:
    names = [*(group.modality for group in config.groups), COMMON]
    sizes = [(group.size, group.experts) for group in config.groups]
    numbers = number_experts([*sizes, (config.common.size, config.common.experts)])
    return {name: experts for name, experts in zip(names, numbers, strict=True) if experts}


def _physical_order(pools: list[tuple[int, ...]], order: str, expert_parallel_size: int) -> tuple[int, ...]:
    """Distribute the experts over the ranks, then sort each rank's experts by pool.

    For ``interleaved``, expert i of a pool of size n is placed at fraction (i + 1/2) / n of the order. Each rank's
    slice then holds the same share of every pool, as far as the sizes are divisible.
    """
    place = {expert: (pool, i) for pool, experts in enumerate(pools) for i, expert in enumerate(experts)}
    if order == "interleaved":
        dealt = sorted(
            place, key=lambda expert: ((2 * place[expert][1] + 1) / len(pools[place[expert][0]]), place[expert])
        )
    else:
        dealt = sorted(place)
    size = len(dealt) // expert_parallel_size
    slices = [dealt[rank * size : (rank + 1) * size] for rank in range(expert_parallel_size)]
    return tuple(expert for share in slices for expert in sorted(share, key=lambda expert: place[expert]))
