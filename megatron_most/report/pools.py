"""The expert pools of a run and the experts open to each modality, read from its configuration without the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_COMMON = "common"
_MOST = 1 << 16
"""Experts of a pool; more are a damaged configuration."""


@dataclass(frozen=True)
class Pools:
    """Experts, in logical numbers.

    Args:
        experts: pool -> its experts, for each modality that has a pool, then ``common``.
        choices: modality -> the experts that its tokens may choose.
    """

    experts: dict[str, tuple[int, ...]]
    choices: dict[str, tuple[int, ...]]

    @property
    def num_experts(self) -> int:
        return sum(map(len, self.experts.values()))

    @property
    def columns(self) -> list[int]:
        """All experts in the order in which they are drawn, pool by pool."""
        return [expert for experts in self.experts.values() for expert in experts]

    def pool_of(self) -> dict[int, str]:
        """Expert -> pool."""
        return {expert: name for name, experts in self.experts.items() for expert in experts}


def read_pools(config: dict[str, Any]) -> Pools | None:
    """Pools of a resolved configuration; None if it does not define them."""
    try:
        moe = config["model"]["moe"]
        groups = [(str(group["modality"]), group) for group in moe["groups"]]
        common = moe.get("common") or {}
        experts: dict[str, tuple[int, ...]] = {}
        start = 0
        for name, entry in [*groups, (_COMMON, common)]:
            listed = tuple(int(expert) for expert in entry.get("experts") or ())
            size = int(entry.get("size") or len(listed))
            if not 0 <= size <= _MOST:
                return None
            if size:
                experts[name] = listed or tuple(range(start, start + size))
                start += size
        allowed = common.get("modalities") or [name for name, _ in groups]
        shared = experts.get(_COMMON, ())
        choices = {name: experts.get(name, ()) + (shared if name in allowed else ()) for name, _ in groups}
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        return None
    pools = Pools(experts, choices)
    return pools if sorted(pools.columns) == list(range(pools.num_experts)) else None
