"""The MoST model on Megatron-Core."""

from megatron_most.model.build import build_model, check_libraries, count_parameters
from megatron_most.model.most_model import MoSTModel

__all__ = ["MoSTModel", "build_model", "check_libraries", "count_parameters"]
