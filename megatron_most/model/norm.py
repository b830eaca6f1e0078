"""RMSNorm for the portable spec. Megatron's wrapper of torch's norms does not support sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square normalization of the last dimension."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **spec_arguments: Any) -> None:
        """Megatron passes ``spec_arguments`` to every norm; they are not needed here."""
        super().__init__(hidden_size, eps=eps, device=torch.cuda.current_device(), dtype=config.params_dtype)
        # Every rank sees only its slice of the sequence; finalize_model_grads sums gradients marked so over the tensor
        # group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # an attribute of Megatron's
