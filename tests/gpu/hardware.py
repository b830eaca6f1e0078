"""What a test needs of the machine, and the name of what is missing."""

from __future__ import annotations

import pytest
import torch

from megatron_most import platform

CUDA, FP8, ENGINE, DOCUMENTS = "CUDA", "FP8", "Transformer Engine", "kernel for packed rows"
GRAPHS = "CUDA graphs"


def missing(what: str) -> str | None:
    """Why this machine cannot run a test that needs ``what``, one of the names above; None if it can."""
    if platform.device().type != "cuda":
        return "no CUDA device"
    if what == FP8 and not platform.has_fp8():
        return "no FP8: the GPU's compute capability is below 8.9"
    if what == ENGINE and not platform.has_library("Transformer Engine"):
        return "no Transformer Engine: not installed, or it cannot be imported"
    if what == DOCUMENTS and (why := platform.why_no_document_attention(192, torch.bfloat16)):
        return f"no kernel for packed rows: {why}"
    return None


def is_ampere() -> bool:
    """Whether the GPU is an Ampere or a later one."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def needs(what: str) -> pytest.MarkDecorator:
    """A mark that skips a test where :func:`missing` says why."""
    reason = missing(what)
    return pytest.mark.skipif(reason is not None, reason=reason or "")
