"""Quantization to FP8 and back, for each recipe.

Shape letters: r rows, k the axis that a product sums over (always the last here), e experts.

Sources: FP8 formats, arXiv 2209.05433; delayed and current per-tensor scaling, Transformer Engine's recipes
``DelayedScaling`` and ``Float8CurrentScaling``; blocks of 1 x 128 and 128 x 128 with scales that are powers of two,
DeepSeek-V3 (arXiv 2412.19437, section 3.3) and Transformer Engine's ``Float8BlockScaling``; blocks of 32 with E8M0
scales, the OCP Microscaling formats specification 1.0, section 6.3, rounding the scale up as
``MXFP8BlockScaling`` does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
BLOCK = 128
MX_BLOCK = 32
_MIN_EXPONENT, _MAX_EXPONENT = -127, 127  # of an E8M0 scale


def largest(name: str) -> float:
    """Largest finite value: 448 of e4m3, 57344 of e5m2."""
    return torch.finfo(FORMATS[name]).max


def round_trip(values: torch.Tensor, scale: torch.Tensor, name: str) -> torch.Tensor:
    """``values * scale``, rounded to FP8 and saturated, divided by ``scale``; fp32. ``scale`` broadcasts."""
    limit = largest(name)
    scaled = (values.float() * scale).clamp(-limit, limit)
    return scaled.to(FORMATS[name]).float() / scale


def tensor_scale(amax: torch.Tensor, name: str) -> torch.Tensor:
    """The scale that maps ``amax`` to the format's largest value; 1 where ``amax`` is 0 or not finite."""
    scale = largest(name) / amax.float()
    return torch.where(torch.isfinite(scale) & (amax > 0), scale, torch.ones_like(scale))


def power_of_two_scale(amax: torch.Tensor, name: str) -> torch.Tensor:
    """:func:`tensor_scale` rounded down to a power of two, so that scaling is exact."""
    _, exponent = torch.frexp(tensor_scale(amax, name))
    return torch.ldexp(torch.ones_like(amax, dtype=torch.float32), exponent - 1)


def e8m0_scale(amax: torch.Tensor, name: str) -> torch.Tensor:
    """Inverse of the E8M0 block scale ``2 ** ceil(log2(amax / largest))``; a block of zeros has the smallest scale."""
    mantissa, exponent = torch.frexp(amax.float() / largest(name))
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)  # mantissas are in [0.5, 1): powers of two have 0.5
    exponent = torch.where(amax > 0, exponent, _MIN_EXPONENT).clamp(_MIN_EXPONENT, _MAX_EXPONENT)
    return torch.ldexp(torch.ones_like(amax, dtype=torch.float32), -exponent)


def in_row_blocks(
    values: torch.Tensor, name: str, block: int, scale_of: Callable[[torch.Tensor, str], torch.Tensor]
) -> torch.Tensor:
    """:func:`round_trip` with one scale for each ``block`` values of the last axis; the last block may be shorter."""
    size = values.shape[-1]
    padded = torch.nn.functional.pad(values.float(), (0, -size % block))
    blocks = padded.unflatten(-1, (-1, block))
    scale = scale_of(blocks.abs().amax(dim=-1, keepdim=True), name)
    return round_trip(blocks, scale, name).flatten(-2)[..., :size]


def in_square_blocks(values: torch.Tensor, name: str) -> torch.Tensor:
    """:func:`round_trip` with a power-of-two scale for each 128 x 128 block of the last two axes."""
    rows, columns = values.shape[-2:]
    padded = torch.nn.functional.pad(values.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))  # [..., r/128, 128, k/128, 128]
    scale = power_of_two_scale(blocks.abs().amax(dim=(-3, -1), keepdim=True), name)
    return round_trip(blocks, scale, name).flatten(-2).flatten(-3, -2)[..., :rows, :columns]
