"""What a configuration needs, before it runs: parameters, FLOPs, memory, time and disk; parallel layouts that fit.

All of it comes from formulas: nothing is allocated, and no GPU is needed.
"""

from megatron_most.lazy import lazy_names

_MODULES = {
    "DEFAULT_IMBALANCE": "gpus",
    "GPUS": "gpus",
    "Gpu": "gpus",
    "Layout": "layouts",
    "MemoryEstimate": "memory",
    "RowContents": "rows",
    "assumed_contents": "rows",
    "check_files": "inputs",
    "describe_layouts": "overview",
    "describe_run": "overview",
    "fitting_layouts": "layouts",
    "forward_flops": "flops",
    "memory_of_rank": "memory",
    "memory_per_rank": "memory",
    "modality_shares": "rows",
    "row_contents": "rows",
    "shard_of_rank": "shards",
    "shard_sizes": "shards",
    "smallest_world_size": "overview",
    "step_seconds": "step_time",
    "train_flops_per_token": "flops",
}
__all__ = list(_MODULES)
__getattr__ = lazy_names(__name__, _MODULES)
