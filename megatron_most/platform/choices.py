"""Which implementation of each part this machine takes where the configuration leaves it open, and why.

The model is built from these answers and ``most doctor`` prints them: there is no second list.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from megatron_most.platform.device import has_fp8
from megatron_most.platform.libraries import has_library, require_library


@dataclass(frozen=True)
class Choice:
    """A part, who computes it here, why, and what is lost by not having better; ``loses`` is empty for the best."""

    part: str
    chosen: str
    reason: str
    loses: str = ""


def model_backend(wanted: str) -> str:
    """``transformer_engine`` or ``portable`` for ``model.transformer_impl``.

    Raises:
        ConfigError: Transformer Engine is asked for by name and is not there.
    """
    if wanted == "auto":
        return "transformer_engine" if torch.cuda.is_available() and has_library("Transformer Engine") else "portable"
    if wanted == "transformer_engine":
        require_library("Transformer Engine", "model.transformer_impl", wanted)
    return wanted


def part_choices() -> list[Choice]:
    """What ``auto`` comes to, and what Megatron takes by itself, part by part."""
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
            "fused kernels; attention over packed rows runs in a few calls a layer instead of one" if is_gpu else "",
        ),
        Choice(
            "routed experts",
            "torch grouped_mm",
            "one product for each pool; keeps the pools' weights apart, so that they can be frozen and kept in bf16",
        ),
        Choice("router", "torch", "no fused router takes a mask for each token, which modalities need"),
        Choice(
            "permutation of tokens",
            "torch",
            f"{engine}'s kernel on request (model.moe.moe_permute_fusion): it has not been timed on a GPU yet",
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
            Choice(
                "AdamW, gradient norms",
                "torch",
                f"{engine} and Apex: {why_not}",
                "one kernel for all parameters instead of one for each" if is_gpu else "",
            )
        )
    return found
