"""What a plan assumes of GPUs and routers.

Peaks and bandwidths are from data sheets. The shares of them that a step reaches were measured on one H100 where the
docstring says so (docs/performance.md), and are assumed elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

_GIB = 1 << 30

DEFAULT_IMBALANCE = 1.25
"""Load of the busiest rank over what the mix of modalities gives it: routers are never perfectly balanced."""


@dataclass(frozen=True)
class Gpu:
    """Numbers of the data sheet.

    Args:
        memory: bytes that a process finds free on an idle device.
        peak: dense bf16 FLOP/s.
        memory_bandwidth: bytes/s.
        node_bandwidth, network_bandwidth: bytes/s that a GPU sends to the others of its node, and to other nodes.
    """

    memory: float
    peak: float
    memory_bandwidth: float
    node_bandwidth: float = 450e9
    network_bandwidth: float = 50e9

    @property
    def usable(self) -> float:
        """What a plan may fill: 3 GiB go to CUDA and NCCL, a tenth of the rest to fragmentation."""
        return (self.memory - 3 * _GIB) * 0.9


GPUS = {"h100": Gpu(79 * _GIB, 989e12, 3.35e12), "h200": Gpu(139 * _GIB, 989e12, 4.8e12)}
GPUS_PER_NODE = 8


class Efficiency:
    """Shares of a GPU's numbers that a step of training reaches."""

    PRODUCTS = 0.6
    """Of the peak, dense layers and heads: assumed. Measured for 8192 x 8192: 0.80."""
    ATTENTION = 0.35
    """Of the peak, flash attention forward and backward: assumed."""
    EXPERTS = ((2.0e10, 0.2), (3.2e11, 0.563))
    """Of the peak, by FLOPs of one expert in forward and backward: measured, torch's grouped products. 384 tokens of 64
    experts: what a step of three layers leaves for them ("A step of three layers"); 6144 tokens of 8 experts ("FP8 on
    the experts"). Smaller loads were bound by the host when measured alone."""
    MEMORY = 0.85
    """Of the memory bandwidth: measured, AdamW in 19 ms for 1.8 billion parameters of 30 bytes each."""
    NODE = 0.73
    """Of the bandwidth inside a node: assumed."""
    NETWORK = 0.8
    """Of the bandwidth between nodes: assumed."""
    HIDDEN_REDUCTION = 0.5
    """Of the reduction of gradients and the gathering of weights, what hides behind the backward pass: assumed."""
    SMALL_KERNEL = 5e-6
    """Seconds of a kernel that is too small to be bound by anything else: assumed."""
