"""Megatron's linear layers with FP8 products. Weights, their sharding, and checkpoints do not change."""

from __future__ import annotations

import torch
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megatron_most.precision.product import Fp8Product


def as_fp8_linear(module: torch.nn.Module, product: Fp8Product) -> None:
    """Make a Megatron linear layer compute with ``product`` from now on.

    This changes the class of the built module. A layer spec cannot name the FP8 class: attention passes arguments that
    depend on the class it finds there.
    """
    module.__class__ = FP8_CLASSES[type(module)]
    assert isinstance(module, _Parallel | Fp8Linear)
    module.fp8 = product


class _Parallel(torch.nn.Module):
    """The product, with the communication that Megatron's own implementation combines with it."""

    fp8: Fp8Product

    def _forward_impl(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        *,
        bias: torch.Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: torch.distributed.ProcessGroup | None,
        **_: object,
    ) -> torch.Tensor:
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        product = self.fp8.linear(input, weight)
        return product if bias is None else product + bias


class Fp8ColumnParallelLinear(_Parallel, ColumnParallelLinear):
    """Weight split along its outputs."""


class Fp8RowParallelLinear(_Parallel, RowParallelLinear):
    """Weight split along its inputs."""


class Fp8Linear(Linear):
    """Weight replicated on every rank."""

    fp8: Fp8Product

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.fp8.linear(x, self.weight), None


FP8_CLASSES: dict[type, type] = {
    ColumnParallelLinear: Fp8ColumnParallelLinear,
    RowParallelLinear: Fp8RowParallelLinear,
    Linear: Fp8Linear,
}
