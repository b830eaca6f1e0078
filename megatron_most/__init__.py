"""Megatron-Core pretraining for MoST: a speech-text mixture-of-experts language model."""

import logging
import warnings
from importlib import metadata

try:
    __version__ = metadata.version("megatron-most")
except metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
    __version__ = "0+not.installed"

# Warnings of Megatron-Core 0.19.2 that a user cannot avoid; ``most doctor`` reports what matters. The filters are set
# here because Megatron warns when it is imported.
for _message in (
    r"(Transformer Engine and )?Apex (is|are) not installed",
    r"MimoModelConfig is experimental",
    r"Could not determine rank from torch\.distributed",
    r"invalid escape sequence",
    r"The '?megatron\.core\.transformer\.custom_layers",
    r"`torch\.distributed\.\w+` is deprecated",
    r"The \.grad attribute of a Tensor that is not a leaf",
):
    warnings.filterwarnings("ignore", message=r"\s*" + _message)

# Messages about common.pt in checkpoints of earlier Megatron versions, and about a CUDA compiler without a GPU.
for _name in (
    "megatron.core.dist_checkpointing.strategies.common",
    "torch.utils.cpp_extension",
):
    logging.getLogger(_name).setLevel(logging.ERROR)
