"""The foreign formats: one class each."""

import dataclasses

from megatron_most.conversion import hf_format
from megatron_most.conversion.architecture import Architecture, ForeignModel
from megatron_most.conversion.architectures.deepseek import DeepSeekV2, DeepSeekV3
from megatron_most.conversion.architectures.dense import Llama, Qwen2, Qwen3
from megatron_most.conversion.architectures.moe import Mixtral, OLMoE, Qwen2MoE, Qwen3MoE
from megatron_most.conversion.architectures.most import MoST
from megatron_most.conversion.config_json import Config, Values
from megatron_most.errors import CheckpointError

ARCHITECTURES: tuple[Architecture, ...] = (
    DeepSeekV2(),
    MoST(),
    Llama(),
    hf_format.HuggingFaceMoST(),
    DeepSeekV3(),
    Qwen3MoE(),
    Qwen2MoE(),
    Mixtral(),
    OLMoE(),
    Qwen2(),
    Qwen3(),
)
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


def read_foreign(values: Values, source: str) -> tuple[Architecture, ForeignModel]:
    """The format and shape of a model, from the ``values`` of its ``config.json``.

    Args:
        source: the file's name in error messages.

    Raises:
        CheckpointError: the format is unknown, or a field is, or has a value that cannot be converted.
    """
    kind = values.get("model_type")
    found = next((entry for entry in ARCHITECTURES if kind in entry.model_types), None)
    if found is None:
        known = ", ".join(name for entry in ARCHITECTURES for name in entry.model_types)
        raise CheckpointError(f"{source}: model_type={kind!r}: can be converted: {known}")
    return found, dataclasses.replace(found.read(Config(values, source)), architecture=found.name)
