"""MoST in plain PyTorch and ``transformers``: what ``most convert export --format hf`` writes beside the weights.

Nothing here imports Megatron or the rest of this package. An export holds copies of these files, and they load with
``trust_remote_code=True`` where this package is not installed. Importing this module registers the classes with
``transformers`` instead, and no remote code is needed.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor

from .configuration_most import MoSTConfig
from .modeling_most import MoSTForConditionalGeneration, MoSTModel
from .processing_most import MoSTProcessor

__all__ = ["MoSTConfig", "MoSTForConditionalGeneration", "MoSTModel", "MoSTProcessor"]

AutoConfig.register(MoSTConfig.model_type, MoSTConfig)
AutoModel.register(MoSTConfig, MoSTModel)
AutoModelForCausalLM.register(MoSTConfig, MoSTForConditionalGeneration)
AutoProcessor.register(MoSTConfig, MoSTProcessor)

# What these classes save has their code beside it, as an export has.
MoSTConfig.register_for_auto_class()
MoSTModel.register_for_auto_class("AutoModel")
MoSTForConditionalGeneration.register_for_auto_class("AutoModelForCausalLM")
MoSTProcessor.register_for_auto_class("AutoProcessor")
