"""RMSNorm for the portable spec, and a norm of all heads of a token.

Megatron's wrapper of torch's norms does not support sequence parallelism. It has no norm over more than a head.

Shape letters: s positions, b rows, n heads of this rank, d head size, tp tensor-parallel ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square normalization of the last dimension."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **spec_arguments: Any) -> None:
        """Megatron passes ``spec_arguments`` to every norm; they are not needed here."""
        super().__init__(hidden_size, eps=eps, device=torch.cuda.current_device(), dtype=config.params_dtype)
        # Every rank sees only its slice of the sequence; finalize_model_grads sums gradients marked so over the tensor
        # group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # an attribute of Megatron's


class AllHeadsNorm(torch.nn.Module):
    """Root-mean-square normalization of all heads of a token together, whichever tensor-parallel ranks hold them.

    The mean is taken over the heads of all ranks. ``weight [n * d]`` is the part of this rank's heads.

    Args:
        num_heads: of this rank.
    """

    def __init__(self, config: TransformerConfig, num_heads: int, head_size: int, tp_group: dist.ProcessGroup) -> None:
        super().__init__()
        self.tp_group, self.head_size, self.epsilon = tp_group, head_size, config.layernorm_epsilon
        self.width = tp_group.size() * num_heads * head_size
        size = num_heads * head_size
        weight = torch.ones(size, device=torch.cuda.current_device(), dtype=config.params_dtype)
        self.weight = torch.nn.Parameter(weight)
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[s, b, n, d]`` -> the same. Computed in fp32."""
        values = x.float()
        total = values.square().sum(dim=(-2, -1), keepdim=True)
        if self.tp_group.size() > 1:
            # Every rank's output depends on every rank's sum: the gradients of the sums are added, too.
            total = reduce_from_tensor_model_parallel_region(total, group=self.tp_group)
            total = copy_to_tensor_model_parallel_region(total, group=self.tp_group)
        normed = values * torch.rsqrt(total / self.width + self.epsilon)
        return (normed * self.weight.view(-1, self.head_size)).to(x.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        assert metadata is not None
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
