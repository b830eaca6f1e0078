"""Logits and cross entropy, computed only at positions that have a target.

Shape letters: t positions of a micro-batch, n of them that have a target, h hidden size, V ids or codes (padded),
tp tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.extensions import transformer_engine


def take_rows(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``rows [t, h]`` and ``index [n]``, without duplicates -> ``[n, h]``."""
    return _TakeRows.apply(rows, index)


def put_rows(rows: torch.Tensor, index: torch.Tensor, num_rows: int) -> torch.Tensor:
    """``rows [n, ...]`` and ``index [n]`` -> ``[t, ...]``: t = ``num_rows`` rows, zeros where ``index`` has none."""
    return rows.new_zeros(num_rows, *rows.shape[1:]).index_copy(0, index, rows)


class _TakeRows(torch.autograd.Function):
    """``index_select`` without duplicates. Its own backward, which allows them, adds rows one by one."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = len(rows)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (index,) = ctx.saved_tensors
        return put_rows(gradient, index, ctx.num_rows), None


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, tensor_group: dist.ProcessGroup) -> torch.Tensor:
    """Cross entropy ``[...]``, fp32, of ``labels [...]`` under ``logits [..., V / tp]``. May overwrite ``logits``."""
    fused = _fused_cross_entropy(logits)
    if fused is None:
        return tensor_parallel.vocab_parallel_cross_entropy(logits, labels, tp_group=tensor_group)
    # The kernel needs three axes. True is is_cg_capturable: its backward then does not read the gradient on the host.
    losses = fused(logits.flatten(0, -2)[None], labels.flatten()[None], tensor_group, True)
    if losses.requires_grad:
        losses.register_hook(torch.Tensor.contiguous)  # its backward ignores the strides of the gradient
    return losses.view(labels.shape)


def _fused_cross_entropy(logits: torch.Tensor) -> Callable[..., torch.Tensor] | None:
    """Transformer Engine's kernel, which reads bf16 logits and computes in fp32; None where it does not apply.

    Megatron's compiled kernel is no alternative: it copies the logits to fp32, and recompiles when the number of rows
    changes.
    """
    is_fit = logits.is_cuda and logits.dtype == torch.bfloat16 and logits.numel() > 0
    return transformer_engine.te_parallel_cross_entropy if is_fit else None
