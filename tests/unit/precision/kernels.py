"""A stand-in for torch's grouped FP8 kernel, which exists on GPUs only: refuses what the kernel refuses."""

from __future__ import annotations

import torch
from torch.nn.functional import ScalingType


def scaled_grouped_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_recipe_a: ScalingType,
    scale_b: torch.Tensor,
    scale_recipe_b: ScalingType,
    *,
    offs: torch.Tensor,
    output_dtype: torch.dtype,
) -> torch.Tensor:
    """``[n, k]`` and ``[e, k, o]``, scales ``[n]`` and ``[e, o]`` -> ``[n, o]``: what the kernel gives, slowly.

    The rules are those of torch's own shape function (types, layouts, 16 bytes, scales) and, beside them, what the CUDA
    source demands: sizes divisible by 16, int32 ends, results in bf16.

    Raises:
        RuntimeError: torch's shape function refuses the operands.
    """
    assert scale_recipe_a == scale_recipe_b == ScalingType.RowWise
    assert not any(size % 16 for size in (a.shape[1], *b.shape[1:]))
    assert offs.dtype == torch.int32 and output_dtype == torch.bfloat16
    on_meta = [tensor.to("meta") for tensor in (a, b, scale_a, scale_b)]
    shape = torch._scaled_grouped_mm(*on_meta, offs=offs.to("meta"), out_dtype=output_dtype).shape
    out = torch.zeros(shape, dtype=output_dtype)
    start = 0
    for index, end in enumerate(offs.tolist()):
        product = a[start:end].float() @ b[index].float()
        out[start:end] = (product * scale_a[start:end, None] * scale_b[index]).to(output_dtype)
        start = end
    return out
