"""Process groups, seeds and what every rank has to know about its place."""

from megatron_most.parallel.context import zigzag_positions
from megatron_most.parallel.groups import data_parallel_place, destroy, initialize, is_rank_zero

__all__ = ["data_parallel_place", "destroy", "initialize", "is_rank_zero", "zigzag_positions"]
