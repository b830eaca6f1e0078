"""Gradient norms of the parts of a model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import param_is_not_shared

from megatron_most import platform
from megatron_most.config import RunConfig
from megatron_most.training.parts import Table, find_tables
from megatron_most.training.table_rows import own_rows


@torch.no_grad()
def part_grad_norms(
    config: RunConfig, chunks: Iterable[torch.nn.Module], optimizer: MegatronOptimizer
) -> dict[str, float]:
    """L2 norm of the gradient of each trainable part, before clipping; the same on every rank. Collective.

    Call it after the backward pass and before ``optimizer.step()``. Like Megatron's total norm, it reads the gradients
    that the optimizer holds: shards in a distributed optimizer, whole gradients otherwise.
    """
    parts = [part for part in config.part_names if config.lr_scale(part) > 0]
    tables = find_tables(config, chunks)
    optimizer.prepare_grads()
    total = torch.zeros(len(parts), dtype=torch.float64, device=platform.device())
    for member in optimizer.chained_optimizers:
        squares = torch.zeros_like(total)
        for part, grads in _gradients(config, tables, member).items():
            norms = torch.stack(torch._foreach_norm(grads))
            squares[parts.index(part)] += norms.double().square().sum()
        dist.all_reduce(squares, group=member.get_grad_stats_parallel_group())
        total += squares
    return {part: math.sqrt(square) for part, square in zip(parts, total.tolist(), strict=True)}


def _gradients(config: RunConfig, tables: list[Table], member: MegatronOptimizer) -> dict[str, list[torch.Tensor]]:
    """The gradients of each trainable part that this rank includes in a sum over ranks."""
    found: dict[str, list[torch.Tensor]] = defaultdict(list)
    split = own_rows(tables, member)
    for group in member.param_groups:
        for main in group["params"]:
            if not _counts(main, member.tp_group):
                continue
            pieces = [(rows.part, rows.gradient) for rows in split if rows.main is main] or [(group["part"], main.grad)]
            for part, gradient in pieces:
                if gradient is not None and config.lr_scale(part) > 0:
                    found[part].append(gradient)
    return found


def _counts(parameter: torch.nn.Parameter, tensor_group: dist.ProcessGroup) -> bool:
    """Whether this rank includes the parameter in a sum over ranks: of all ranks with a copy, exactly one does."""
    return (
        parameter.grad is not None
        and param_is_not_shared(parameter)
        and tensor_parallel.param_is_not_tensor_parallel_duplicate(parameter, tensor_group)
    )
