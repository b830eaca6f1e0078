"""Attention kernels of torch on this machine. Each is tried before it is used: builds and devices differ.

Shape letters: t positions of a packed row and k keys, n query heads and g key-value heads, d head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend

from megatron_most.platform.device import device


def document_attention(head_dim: int, dtype: torch.dtype) -> Callable[..., tuple[torch.Tensor, ...]] | None:
    """torch's flash attention for packed rows: queries ``[t, n, d]``, keys and values ``[k, g, d]``. None if it fails.

    Where a document has more keys than queries, the last query sees all keys, the one before it all but the last.

    ``torch.nn.attention.varlen`` calls the same kernel. This operator has its gradient in C++; the public function is
    in Python, takes several times as much host time, and changed its arguments from torch 2.10 to 2.12.
    """
    return None if why_no_document_attention(head_dim, dtype) else torch.ops.aten._flash_attention_forward


@functools.cache
def why_no_document_attention(head_dim: int, dtype: torch.dtype) -> str:
    """Why :func:`document_attention` is None; empty if it is not."""
    if not torch.cuda.is_available():
        return "no GPU"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"torch's FlashAttention does not take {dtype}"
    try:
        with torch.inference_mode(False), torch.enable_grad():
            query, key = (
                torch.zeros(length, heads, head_dim, dtype=dtype, device=device(), requires_grad=True)
                for length, heads in ((4, 2), (6, 1))
            )
            # The kernel takes heads whose elements follow each other, so the values are not a view of one column.
            value = torch.arange(6.0, device=device()).to(dtype)[:, None, None].repeat(1, 1, head_dim)
            boundaries = [torch.tensor(ends, dtype=torch.int32, device=device()) for ends in ([0, 1, 4], [0, 2, 6])]
            out = torch.ops.aten._flash_attention_forward(
                query, key, value, *boundaries, 3, 4, 0.0, True, False, scale=1.0
            )[0]
            out.sum().backward()
            found = out[:, 0, 0].tolist()
    except (RuntimeError, TypeError) as error:
        return f"torch's FlashAttention fails: {str(error).splitlines()[0]}"
    # Queries of zeros average the values of the keys that they see.
    wanted = [0.5, 2.5, 3.0, 3.5]
    return "" if found == wanted else f"torch's FlashAttention gives {found} where {wanted} is right"


@functools.cache
def wants_equal_head_sizes(key_size: int, value_size: int, dtype: torch.dtype) -> bool:
    """Whether causal attention without a mask gets a fused kernel only if value heads are as large as key heads.

    torch is asked which kernel it would take. FlashAttention needs equal sizes; cuDNN's kernel does not.
    """
    if value_size >= key_size:
        return False
    slow = (SDPBackend.MATH.value, SDPBackend.EFFICIENT_ATTENTION.value)

    def chosen(size: int) -> int:
        with torch.inference_mode(False):
            query, value = (
                torch.empty(1, 1, 128, width, dtype=dtype, device=device(), requires_grad=True)
                for width in (key_size, size)
            )
            return torch._fused_sdp_choice(query, query, value, is_causal=True)

    try:
        return chosen(value_size) in slow and chosen(key_size) not in slow
    except (AttributeError, RuntimeError, TypeError):  # not a public function of torch
        return False
