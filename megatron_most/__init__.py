"""Megatron-Core pretraining for MoST: a speech-text mixture-of-experts language model."""

import logging
import warnings
from importlib import metadata

try:
    __version__ = metadata.version("megatron-most")
except metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
    __version__ = "0+not.installed"

# What Megatron-Core 0.19.2 warns of whatever its user does, and ``most doctor`` says better. Set here because Megatron
# warns while it is imported.
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

# That a checkpoint of an earlier Megatron has a common.pt, and that a compiler for CUDA is there where no GPU is.
for _name in (
    "megatron.core.dist_checkpointing.strategies.common",
    "torch.utils.cpp_extension",
):
    logging.getLogger(_name).setLevel(logging.ERROR)
