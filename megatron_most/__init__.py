"""Megatron-Core pretraining for MoST: a speech-text mixture-of-experts language model."""

import logging
import warnings

__version__ = "0.1.0"

# What Megatron-Core 0.19.2 warns of whatever its user does, and ``most doctor`` says better. Set here because Megatron
# warns while it is imported.
for _message in (
    r"(Transformer Engine and )?Apex (is|are) not installed",
    r"full scope is deprecated",
    r"MimoModelConfig is experimental",
    r"invalid escape sequence",
    r"The '?megatron\.core\.transformer\.custom_layers",
    r"`torch\.distributed\.\w+` is deprecated",
    r"The \.grad attribute of a Tensor that is not a leaf",
):
    warnings.filterwarnings("ignore", message=r"\s*" + _message)

# That GPTModel gets no new features, that gradient buffers are laid out where we let them be, that common.pt is old.
for _name in (
    "models.gpt.gpt_model",
    "distributed.distributed_data_parallel",
    "dist_checkpointing.strategies.common",
):
    logging.getLogger(f"megatron.core.{_name}").setLevel(logging.ERROR)
