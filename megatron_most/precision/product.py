"""The three products of a linear layer, with operands quantized to FP8.

Shape letters: n tokens, k inputs, o outputs, e experts.

The products are ``y = x w^T``, ``dx = g w`` and ``dw = g^T x``. As in Transformer Engine, each operand is quantized
from full precision along the axis that its product sums over. Per-tensor recipes and the square blocks of weights give
the same values along both axes.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_most.config import PrecisionConfig
from megatron_most.precision import formats
from megatron_most.precision.scaling import AmaxHistory


class Fp8Product:
    """The FP8 products of one linear layer or of the experts of one pool, emulated on any device.

    Values are quantized, dequantized, and multiplied in the dtype of the input with fp32 sums. The result is that of an
    FP8 kernel except for the order of sums. Passes without gradients (evaluation, the first forward of recomputed
    layers) do not change histories and counts.

    Args:
        count: experts of the pool; 1 for a linear layer.
    """

    def __init__(self, precision: PrecisionConfig, count: int = 1) -> None:
        self.recipe = precision.fp8_recipe
        self.formats = {
            "input": "e4m3",
            "weight": "e4m3",
            "gradient": "e5m2" if precision.fp8 == "hybrid" else "e4m3",
        }
        self.alignment = precision.alignment
        self.count = count
        self.history: AmaxHistory | None = None
        if self.recipe == "delayed":
            self.history = AmaxHistory(precision.fp8_amax_history_len, count, torch.cuda.current_device())
        self.is_recording = True
        self.rows = self.padded_rows = 0

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``[..., k]`` and ``[o, k]`` -> ``[..., o]``."""
        self.is_recording = torch.is_grad_enabled()
        return _Linear.apply(x.flatten(0, -2), weight, self).unflatten(0, x.shape[:-1])

    def grouped(self, x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """``[n, k]`` sorted by expert, ``[e, o, k]``, and the ends of each expert's tokens ``[e]`` int32 -> ``[n, o]``.

        ``alignment`` must divide the number of tokens of each expert; see :meth:`padding`.
        """
        self.is_recording = torch.is_grad_enabled()
        return _Grouped.apply(x, weight, ends, self)

    def padding(self, counts: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Lay out the tokens of each expert, padded to a multiple of ``alignment``.

        Args:
            counts: tokens of each expert.

        Returns:
            The row of each token ``[n]``, the ends of each expert's rows ``[e]`` int32, and the number of rows.
        """
        host = torch.tensor([counts, [-(-count // self.alignment) * self.alignment for count in counts]])
        ends = host.cumsum(1)
        num_tokens, num_rows = ends[:, -1].tolist()
        # An expert's tokens are shifted by the padding of all experts before it.
        shifts = (ends[1] - host[1]) - (ends[0] - host[0])
        host = torch.stack([host[0], ends[1], shifts])
        if device.type == "cuda":
            host = host.pin_memory()  # so that the host does not wait for the copy
        sizes, padded_ends, shifts = host.to(device, non_blocking=True)
        places = torch.arange(num_tokens, device=device)
        places += shifts.repeat_interleave(sizes, output_size=num_tokens)
        if torch.is_grad_enabled():
            self.rows += num_rows
            self.padded_rows += num_rows - num_tokens
        return places, padded_ends.int(), num_rows

    def multiply(self, a: torch.Tensor, a_role: str, b: torch.Tensor, b_role: str) -> torch.Tensor:
        """``[n, k]`` and ``[o, k]`` -> ``a b^T``, ``[n, o]``."""
        return self.quantized(a, a_role) @ self.quantized(b, b_role).t()

    def multiply_grouped(
        self, a: torch.Tensor, role: str, weight: torch.Tensor, ends: torch.Tensor, owner: torch.Tensor
    ) -> torch.Tensor:
        """``[n, k]`` and ``[e, o, k]`` -> ``[n, o]``: each row times its expert's matrix. ``owner``: its expert."""
        a, weight = self.quantized(a, role, owner), self.quantized(weight, "weight")
        return torch.nn.functional.grouped_mm(a, weight.transpose(1, 2), offs=ends)

    def multiply_tokens(
        self, gradient: torch.Tensor, x: torch.Tensor, ends: torch.Tensor, owner: torch.Tensor
    ) -> torch.Tensor:
        """``[n, o]`` and ``[n, k]`` -> ``g^T x`` over each expert's tokens, ``[e, o, k]``."""
        gradient = self._along_tokens(gradient, "gradient", ends, owner)
        x = self._along_tokens(x, "input", ends, owner)
        return torch.nn.functional.grouped_mm(gradient.t(), x, offs=ends)

    def quantized(self, tensor: torch.Tensor, role: str, owner: torch.Tensor | None = None) -> torch.Tensor:
        """``tensor [..., k]`` quantized along its last axis and dequantized, in its own dtype.

        Args:
            owner: ``[n]``, the expert of each row of a tensor of tokens; None for weights, whose first axis is experts.
        """
        name = self.formats[role]
        if self.recipe == "mxfp8":
            found = formats.in_row_blocks(tensor, name, formats.MX_BLOCK, formats.e8m0_scale)
        elif self.recipe != "blockwise":
            found = formats.round_trip(tensor, self.scale(tensor, role, owner), name)
        elif role == "weight":
            found = formats.in_square_blocks(tensor, name)
        else:
            found = formats.in_row_blocks(tensor, name, formats.BLOCK, formats.power_of_two_scale)
        return found.to(tensor.dtype)

    def scale(self, tensor: torch.Tensor, role: str, owner: torch.Tensor | None = None) -> torch.Tensor:
        """The per-tensor scale: one, or one for each row's expert ``[n, 1]``, or for each weight ``[e, 1, 1]``."""
        magnitudes = tensor.detach().abs()
        if owner is not None:
            amax = torch.zeros(self.count, device=tensor.device)
            amax.scatter_reduce_(0, owner, magnitudes.amax(dim=-1).float(), "amax")
        else:
            flat = magnitudes.reshape(self.count, -1)
            amax = flat.amax(dim=1).float() if flat.numel() else torch.zeros(self.count, device=tensor.device)
        name = self.formats[role]
        if self.history is None:
            scale = formats.tensor_scale(amax, name)
        else:
            scale = self.history.scale(role, amax, name, self.is_recording)
        return scale[owner][:, None] if owner is not None else scale.view(-1, *[1] * (tensor.dim() - 1))

    def _along_tokens(self, tensor: torch.Tensor, role: str, ends: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        """``[n, c]`` quantized along the tokens of each expert; no block spans two experts."""
        if self.recipe in ("delayed", "tensorwise"):
            return self.quantized(tensor, role, owner)
        pieces = tensor.tensor_split(ends[:-1].tolist())
        return torch.cat([self.quantized(piece.t(), role).t() if len(piece) else piece for piece in pieces])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, fp8: Fp8Product) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.fp8 = fp8
        return fp8.multiply(x, "input", weight, "weight")

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.fp8.is_recording = True
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        dx = ctx.fp8.multiply(gradient, "gradient", weight.t(), "weight") if needs_x else None
        dw = ctx.fp8.multiply(gradient.t(), "gradient", x.t(), "input") if needs_weight else None
        return dx, dw, None


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, fp8: Fp8Product) -> torch.Tensor:
        owner = torch.searchsorted(ends, torch.arange(len(x), device=x.device, dtype=ends.dtype), right=True)
        ctx.save_for_backward(x, weight, ends, owner)
        ctx.fp8 = fp8
        return fp8.multiply_grouped(x, "input", weight, ends, owner)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.fp8.is_recording = True
        x, weight, ends, owner = ctx.saved_tensors
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        gradient = gradient.contiguous()
        dx = dw = None
        if needs_x:
            dx = ctx.fp8.multiply_grouped(gradient, "gradient", weight.transpose(1, 2), ends, owner)
        if needs_weight:
            dw = ctx.fp8.multiply_tokens(gradient, x, ends, owner)
        return dx, dw, None, None
