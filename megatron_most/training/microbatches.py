"""Runs the micro-batches of a step through Megatron's schedules.

Shape letters: M micro-batches of this rank, R rows of the metric table.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model

from megatron_most import platform
from megatron_most.data.loading.batch import Batch
from megatron_most.model.packed_row import PackedRow, packed_row
from megatron_most.parallel import zigzag_positions, zigzag_positions_packed
from megatron_most.training.loss import LossTable


def forward_step(
    loss_table: LossTable, batches: Iterator[Batch], model: torch.nn.Module
) -> tuple[torch.Tensor, Callable]:
    """Run one pipeline stage on the next micro-batch.

    Returns:
        The stage's output, and a function that turns the output of the last stage into losses.
    """
    batch = context_share(next(batches))
    output = model(
        batch.ids,
        batch.modality,
        batch.is_padding,
        codes=batch.codes,
        targets=batch.targets() if get_attr_wrapped_model(model, "post_process") else None,
        packed_seq_params=packed_seq_params(batch) if batch.packed_row is None else batch.packed_row,
    )
    return output, functools.partial(loss_table, batch)


def context_share(batch: Batch) -> Batch:
    """The positions that this context-parallel rank holds; the batch itself if it is a share already."""
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    if size == 1 or batch.positions is not None:
        return batch
    if batch.cu_seqlens is None:
        return batch.take_positions(zigzag_positions(batch.ids.shape[1], rank, size))
    return batch.take_positions(zigzag_positions_packed(batch.cu_seqlens, rank, size))


def packed_seq_params(batch: Batch) -> PackedRow | None:
    """The documents of a packed row from the view of this context-parallel rank; None if the batch is not packed."""
    if batch.cu_seqlens is None:
        return None
    return packed_row(
        batch.cu_seqlens,
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_context_parallel_world_size(),
        batch.ids.device,
    )


def stage(batch: Batch, device: torch.device) -> Batch:
    """This rank's share of the batch, on ``device`` and with its packed row. Thread-safe."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the current device is a setting of the thread
    batch = context_share(batch).to(device)
    return dataclasses.replace(batch, packed_row=packed_seq_params(batch))


def run_microbatches(
    model_chunks: list[torch.nn.Module], batches: list[Batch], loss_table: LossTable, forward_only: bool = False
) -> torch.Tensor:
    """Forward and, unless ``forward_only``, backward of this rank's micro-batches. Megatron reduces the gradients.

    Returns:
        The metric tables ``[M, R, 2]`` float64, one for each micro-batch. They are zero except on the last pipeline
        stage of the first tensor-parallel rank, so that a sum over all ranks counts every position once.
    """
    iterators = [iter(batches) for _ in model_chunks]
    single = len(model_chunks) == 1
    share = 1 if batches[0].positions is None else parallel_state.get_context_parallel_world_size()
    tables = get_forward_backward_func()(
        forward_step_func=functools.partial(forward_step, loss_table),
        data_iterator=iterators[0] if single else iterators,
        model=model_chunks[0] if single else model_chunks,
        num_microbatches=len(batches),
        seq_length=batches[0].ids.shape[1] * share,  # of the whole row
        micro_batch_size=batches[0].ids.shape[0],
        forward_only=forward_only,
    )
    if tables and parallel_state.get_tensor_model_parallel_rank() == 0:
        stacked = torch.stack(tables)
        if parallel_state.get_context_parallel_rank() > 0:
            # Context-parallel ranks hold different positions of the same rows; count the rows only once.
            stacked[:, loss_table.names.index("tokens"), 1] = 0
        return stacked
    return torch.zeros(len(batches), len(loss_table.names), 2, dtype=torch.float64, device=platform.device())


def sum_over_ranks(tables: torch.Tensor, more: torch.Tensor | None = None) -> list[list[float]]:
    """Sum the tables of :func:`run_microbatches` over micro-batches and ranks, and copy the sums to the host.

    Args:
        more: ``[n, 2]`` float64, further rows to sum over ranks; their sums follow those of the tables.

    Returns:
        ``[R + n][2]``, the same on every rank.
    """
    table = tables.sum(dim=0)
    if more is not None:
        table = torch.cat([table, more])
    dist.all_reduce(table)
    return table.tolist()
