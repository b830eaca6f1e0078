"""FP8 products computed by torch's kernels, on GPUs that support them. Per-tensor recipes only."""

from __future__ import annotations

import torch
from torch.nn.functional import ScalingType, scaled_grouped_mm, scaled_mm  # type: ignore[attr-defined]  # no stub

from megatron_most import platform
from megatron_most.precision import formats
from megatron_most.precision.product import Fp8Product


class ScaledMMProduct(Fp8Product):
    """:class:`Fp8Product` computed in FP8 by ``scaled_mm`` and ``scaled_grouped_mm``.

    Some products of experts are still emulated, that is, FP8 values are multiplied in bf16:

    - weight gradients: the grouped kernel that sums over tokens needs a scale for each row and expert, which per-tensor
      recipes do not have;
    - products with an e5m2 operand, the gradients of ``hybrid``: the grouped kernel supports only e4m3;
    - all products, on GPUs without a grouped kernel.
    """

    def multiply(self, a: torch.Tensor, a_role: str, b: torch.Tensor, b_role: str) -> torch.Tensor:
        a8, a_scale = self._cast(a, a_role)
        b8, b_scale = self._cast(b, b_role)
        return scaled_mm(
            a8.contiguous(),
            b8.contiguous().t(),
            a_scale.reshape(()),
            ScalingType.TensorWise,
            b_scale.reshape(()),
            ScalingType.TensorWise,
            output_dtype=a.dtype,
        )

    def multiply_grouped(
        self, a: torch.Tensor, role: str, weight: torch.Tensor, ends: torch.Tensor, owner: torch.Tensor
    ) -> torch.Tensor:
        if self.formats[role] != "e4m3" or not platform.has_grouped_fp8():
            return super().multiply_grouped(a, role, weight, ends, owner)
        a8, a_scale = self._cast(a, role, owner)
        weight8, weight_scale = self._cast(weight, "weight")
        return scaled_grouped_mm(
            a8.contiguous(),
            weight8.contiguous().transpose(1, 2),
            a_scale.flatten(),
            ScalingType.RowWise,
            weight_scale.flatten(1).expand(-1, weight.shape[1]).contiguous(),
            ScalingType.RowWise,
            offs=ends,
            output_dtype=a.dtype,
        )

    def _cast(
        self, tensor: torch.Tensor, role: str, owner: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tensor in FP8, and the inverse of its scale, which dequantizes it."""
        name, scale = self.formats[role], self.scale(tensor, role, owner)
        limit = formats.largest(name)
        return (tensor.float() * scale).clamp(-limit, limit).to(formats.FORMATS[name]), scale.reciprocal()
