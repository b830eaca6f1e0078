"""Process groups, seeds, the place of a rank in them, and errors that end all ranks together."""

from megatron_most.parallel.collective_errors import fail, on_rank_zero, together
from megatron_most.parallel.context import zigzag_positions, zigzag_positions_packed
from megatron_most.parallel.groups import (
    data_parallel_place,
    destroy,
    initialize,
    is_first_of_replica,
    is_rank_zero,
    speaks_for_model,
    whole_model_group,
    whole_model_place,
)

__all__ = [
    "data_parallel_place",
    "destroy",
    "fail",
    "initialize",
    "is_first_of_replica",
    "is_rank_zero",
    "on_rank_zero",
    "speaks_for_model",
    "together",
    "whole_model_group",
    "whole_model_place",
    "zigzag_positions",
    "zigzag_positions_packed",
]
