"""What a configuration needs before it runs: parameters, FLOPs and memory of every rank, layouts that fit.

All of it comes from formulas: nothing is allocated, and no device is needed.
"""

from megatron_most.planning.flops import forward_flops, modality_shares, train_flops_per_token
from megatron_most.planning.layouts import GPUS, Gpu, Layout, fitting_layouts
from megatron_most.planning.memory import DEFAULT_IMBALANCE, MemoryEstimate, memory_of_rank, memory_per_rank
from megatron_most.planning.overview import describe_layouts, describe_run, smallest_world_size
from megatron_most.planning.shards import shard_of_rank, shard_sizes

__all__ = [
    "DEFAULT_IMBALANCE",
    "GPUS",
    "Gpu",
    "Layout",
    "MemoryEstimate",
    "describe_layouts",
    "describe_run",
    "fitting_layouts",
    "forward_flops",
    "memory_of_rank",
    "memory_per_rank",
    "modality_shares",
    "shard_of_rank",
    "shard_sizes",
    "smallest_world_size",
    "train_flops_per_token",
]
