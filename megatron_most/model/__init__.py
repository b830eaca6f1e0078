"""The MoST model on Megatron-Core."""

from megatron_most.model.build import build_model, check_libraries, count_parameters
from megatron_most.model.key_value_cache import KeyValueCache
from megatron_most.model.most_model import MoSTModel

__all__ = ["KeyValueCache", "MoSTModel", "build_model", "check_libraries", "count_parameters"]
