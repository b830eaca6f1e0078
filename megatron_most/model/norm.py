"""RMSNorm for the portable spec; Megatron's own wrapper of torch's norms refuses sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square normalization of the last dimension."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **spec_arguments: Any) -> None:
        """``spec_arguments`` are what Megatron hands to every norm and this one has no use for."""
        super().__init__(hidden_size, eps=eps, device=torch.cuda.current_device(), dtype=config.params_dtype)
        # Each rank sees its slice of the sequence: finalize_model_grads sums such gradients over the tensor group.
        self.weight.sequence_parallel = config.sequence_parallel
