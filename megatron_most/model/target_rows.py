"""Logits and cross entropy at the positions that have a target, and nowhere else.

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
    """``rows [t, h]`` and ``index [n]``, which names none twice, -> ``[n, h]``."""
    return _TakeRows.apply(rows, index)


def put_rows(rows: torch.Tensor, index: torch.Tensor, num_rows: int) -> torch.Tensor:
    """``rows [n, ...]`` at the places ``index [n]`` among ``num_rows``, zeros elsewhere: ``[t, ...]``."""
    return rows.new_zeros(num_rows, *rows.shape[1:]).index_copy(0, index, rows)


class _TakeRows(torch.autograd.Function):
    """``index_select``, whose own backward adds rows up one by one for the case that some were taken twice."""

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
    """Cross entropy of ``labels [...]`` under ``logits [..., V / tp]``: ``[...]`` fp32.

    Do not use ``logits`` again: what they become is written over them where that saves a copy.
    """
    fused = _fused_cross_entropy(logits)
    if fused is None:
        return tensor_parallel.vocab_parallel_cross_entropy(logits, labels, tp_group=tensor_group)
    # The kernel takes three axes; the last argument keeps its backward from asking the device what the gradient is.
    losses = fused(logits.flatten(0, -2)[None], labels.flatten()[None], tensor_group, True)
    if losses.requires_grad:
        losses.register_hook(torch.Tensor.contiguous)  # it steps through the gradient without asking for its strides
    return losses.view(labels.shape)


def _fused_cross_entropy(logits: torch.Tensor) -> Callable[..., torch.Tensor] | None:
    """Transformer Engine's kernel, which reads bf16 and counts in fp32; None where Megatron's own needs fp32 logits.

    Megatron's compiled one is no alternative: it makes an fp32 copy as well, and is compiled anew for other numbers of
    rows.
    """
    is_fit = logits.is_cuda and logits.dtype == torch.bfloat16 and logits.numel() > 0
    return transformer_engine.te_parallel_cross_entropy if is_fit else None
