"""A linear layer's three products, each of tensors that went through FP8.

Shape letters: n tokens, k inputs, o outputs, e experts.

``y = x w^T``, ``dx = g w`` and ``dw = g^T x``. Each operand is quantized along the axis its product sums over, from its
full-precision value, as Transformer Engine does; per-tensor recipes and the square blocks of a weight give the same
values along both axes.
"""

from __future__ import annotations

import torch

from megatron_most.config import PrecisionConfig
from megatron_most.precision import formats
from megatron_most.precision.scaling import AmaxHistory


class Fp8Product:
    """What one linear layer, or the experts of one pool, does in FP8: here emulated, on any device.

    Values are quantized, dequantized and multiplied in the dtype of the input, with fp32 sums: what an FP8 kernel
    computes but for the order of its sums. What runs without gradients (evaluation, a pass whose layers are computed
    again) leaves no trace in histories and counts.

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
        """``[n, k]`` sorted by expert, ``[e, o, k]`` and where each expert's tokens end, ``[e]`` int32 -> ``[n, o]``.

        The number of tokens of each expert must be a multiple of ``alignment`` (:meth:`padding`).
        """
        self.is_recording = torch.is_grad_enabled()
        return _Grouped.apply(x, weight, ends, self)

    def padding(self, counts: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Where each expert's tokens go when their number is filled up with zeros to whole alignments.

        Args:
            counts: tokens of each expert.

        Returns:
            places ``[n]`` of the tokens, where each expert's now end (``[e]`` int32), and how many rows there are.
        """
        host = torch.tensor([counts, [-(-count // self.alignment) * self.alignment for count in counts]])
        ends = host.cumsum(1)
        num_tokens, num_rows = ends[:, -1].tolist()
        # Before an expert's first token come the zeros of all experts before it.
        shifts = (ends[1] - host[1]) - (ends[0] - host[0])
        host = torch.stack([host[0], ends[1], shifts])
        if device.type == "cuda":
            host = host.pin_memory()  # so that the host does not wait for the device, in every layer
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
        """``[n, k]`` and ``[e, o, k]`` -> each row times its expert's matrix, ``[n, o]``."""
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
        """``tensor [..., k]``, to be summed over its last axis, after FP8; in its own dtype.

        Args:
            owner: ``[n]`` the expert of each row, where rows belong to several; a weight's is its first axis.
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
        """The per-tensor scale: of each row's expert ``[n, 1]``, of each expert's weight ``[e, 1, 1]``, or one."""
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
        """``[n, c]`` quantized for a sum over each expert's tokens: blocks begin anew with each expert."""
        if self.recipe in ("delayed", "tensorwise"):
            return self.quantized(tensor, role, owner)
        pieces = tensor.tensor_split(ends[:-1].tolist())
        return torch.cat([self.quantized(piece.t(), role).t() if len(piece) else piece for piece in pieces])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, fp8: Fp8Product) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.fp8 = fp8
        return fp8.multiply(x, "input", weight, "weight")

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.fp8.is_recording = True
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        dx = ctx.fp8.multiply(gradient, "gradient", weight.t(), "weight") if needs_x else None
        dw = ctx.fp8.multiply(gradient.t(), "gradient", x.t(), "input") if needs_weight else None
        return dx, dw, None


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, fp8: Fp8Product) -> torch.Tensor:
        owner = torch.searchsorted(ends, torch.arange(len(x), device=x.device, dtype=ends.dtype), right=True)
        ctx.save_for_backward(x, weight, ends, owner)
        ctx.fp8 = fp8
        return fp8.multiply_grouped(x, "input", weight, ends, owner)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
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
