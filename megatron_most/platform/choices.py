"""The implementation of each part that this machine uses if the configuration says ``auto``, and the reason.

The model is built from these choices, and ``most doctor`` prints them.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from megatron_most.platform.attention import why_no_document_attention
from megatron_most.platform.device import has_fp8
from megatron_most.platform.libraries import has_library, require_library


@dataclass(frozen=True)
class Choice:
    """The implementation of a part, the reason, and what a better one would give; ``loses`` is empty for the best."""

    part: str
    chosen: str
    reason: str
    loses: str = ""


def model_backend(wanted: str) -> str:
    """``transformer_engine`` or ``portable`` for ``model.transformer_impl``.

    Raises:
        ConfigError: ``transformer_engine`` is wanted and cannot be used.
    """
    if wanted == "auto":
        return "transformer_engine" if torch.cuda.is_available() and has_library("Transformer Engine") else "portable"
    if wanted == "transformer_engine":
        require_library("Transformer Engine", "model.transformer_impl", wanted)
    return wanted


def part_choices() -> list[Choice]:
    """The choices for every part, those that Megatron makes by itself included."""
    is_gpu = torch.cuda.is_available()
    has_te = is_gpu and has_library("Transformer Engine")
    has_apex = importlib.util.find_spec("amp_C") is not None
    why_not = "not installed or not importable" if is_gpu else "no GPU"
    engine = "Transformer Engine"
    found = [
        Choice("attention, norms, linear layers", engine, "installed")
        if has_te
        else Choice(
            "attention, norms, linear layers",
            "torch",
            f"{engine}: {why_not}",
            _lost_without_engine() if is_gpu else "",
        ),
        Choice(
            "routed experts",
            "torch grouped_mm",
            "one product for each pool; keeps the pools' weights apart, so that they can be frozen and kept in bf16",
        ),
        Choice(
            "router",
            "torch",
            "Megatron's fused router takes no mask per token; model.moe.moe_router_fusion=null tries a Triton kernel"
            if is_gpu
            else "Megatron's fused router takes no mask per token, which modalities need",
        ),
        Choice("permutation of tokens", engine, "installed; model.moe.moe_permute_fusion=false takes torch")
        if has_te
        else Choice(
            "permutation of tokens",
            "torch",
            f"{engine}: {why_not}",
            "two kernels instead of about ten" if is_gpu else "",
        ),
    ]
    if has_te:
        found.append(Choice("FP8", engine, "installed"))
    elif has_fp8():
        loses = "the recipes blockwise and mxfp8, and FP8's speed in gradients of the experts"
        found.append(Choice("FP8", "torch scaled_mm", f"{engine}: {why_not}", loses))
    else:
        reason = "no GPU of compute capability 8.9"
        found.append(Choice("FP8", "emulation only (precision.fp8_backend=emulate)", reason, "all of FP8's speed"))
    if has_te or has_apex:
        found.append(Choice("AdamW, gradient norms", engine if has_te else "Apex", "installed"))
    else:
        found.append(
            Choice("AdamW, gradient norms", "torch, fused" if is_gpu else "torch", f"{engine} and Apex: {why_not}")
        )
    return found


def _lost_without_engine() -> str:
    why_not = why_no_document_attention(128, torch.bfloat16)
    if not why_not:
        return "fused kernels"
    return f"fused kernels; attention over packed rows runs in a few calls a layer instead of one ({why_not})"
