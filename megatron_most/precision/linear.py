"""Megatron's linear layers with FP8 products. Weights, their sharding and checkpoints stay as they are."""

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
    """Have a linear layer of Megatron's compute with ``product`` from now on.

    The class of the object changes, not its parameters: attention picks its arguments by the class it is built with.
    """
    module.__class__ = FP8_CLASSES[type(module)]
    module.fp8 = product


class _Parallel:
    """The product between the communication of forward and backward, which Megatron fuses with it for dense ones."""

    fp8: Fp8Product

    def _forward_impl(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: torch.distributed.ProcessGroup | None,
        **_: object,
    ) -> torch.Tensor:
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        return self.fp8.linear(input, weight)


class Fp8ColumnParallelLinear(_Parallel, ColumnParallelLinear):
    """Weight cut along its outputs."""


class Fp8RowParallelLinear(_Parallel, RowParallelLinear):
    """Weight cut along its inputs."""


class Fp8Linear(Linear):
    """Weight whole on every rank."""

    fp8: Fp8Product

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.fp8.linear(x, self.weight), None


FP8_CLASSES: dict[type, type] = {
    ColumnParallelLinear: Fp8ColumnParallelLinear,
    RowParallelLinear: Fp8RowParallelLinear,
    Linear: Fp8Linear,
}
