"""What a plan assumes: the GPUs it knows, and how uneven routers are."""

from __future__ import annotations

from dataclasses import dataclass

_GIB = 1 << 30

DEFAULT_IMBALANCE = 1.25
"""Load of the busiest rank over what the mix of modalities alone gives it; routers are never quite even."""


@dataclass(frozen=True)
class Gpu:
    """Data-sheet numbers.

    Args:
        memory: bytes a process finds free on an idle device.
        peak: dense bf16 FLOP/s.
        node_bandwidth, network_bandwidth: bytes/s that a GPU sends to the others of its node, and to other nodes.
    """

    memory: float
    peak: float
    node_bandwidth: float = 450e9
    network_bandwidth: float = 50e9

    @property
    def usable(self) -> float:
        """What a plan may fill: 3 GiB go to CUDA and NCCL, a tenth of the rest to fragments."""
        return (self.memory - 3 * _GIB) * 0.9


GPUS = {"h100": Gpu(79 * _GIB, 989e12), "h200": Gpu(139 * _GIB, 989e12)}
