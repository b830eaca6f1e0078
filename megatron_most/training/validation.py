"""Losses on the validation sets, computed by forward passes that do not change the training state."""

from __future__ import annotations

import dataclasses

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

from megatron_most.data.loading.batch import Batch
from megatron_most.training.loss import LossTable
from megatron_most.training.metrics import mean_losses
from megatron_most.training.microbatches import run_microbatches, sum_over_ranks


def validate(
    wrapped: list[DistributedDataParallel], datasets: dict[str, list[Batch]], loss_table: LossTable
) -> dict[str, float]:
    """Losses of every dataset, as ``validation/<dataset>/<name>`` with the names of :class:`LossTable`. Collective.

    Args:
        datasets: this rank's batches, on its device; every data-parallel rank has the same number.
    """
    losses: dict[str, float] = {}
    for chunk in wrapped:
        chunk.eval()
    with torch.no_grad():
        for name, batches in datasets.items():
            tables = run_microbatches(wrapped, _fill_pipeline(batches, len(wrapped)), loss_table, forward_only=True)
            means = mean_losses(loss_table.names, sum_over_ranks(tables))
            losses |= {f"validation/{name}/{metric}": value for metric, value in means.items()}
    for chunk in wrapped:
        chunk.train()
    return losses


def _fill_pipeline(batches: list[Batch], num_chunks: int) -> list[Batch]:
    """Add micro-batches of padding: with virtual stages, their number must be a multiple of the pipeline size."""
    missing = -len(batches) % parallel_state.get_pipeline_model_parallel_world_size() if num_chunks > 1 else 0
    last = batches[-1]
    assert last.predicts is not None
    empty = dataclasses.replace(
        last,
        loss_mask=torch.zeros_like(last.loss_mask),
        is_padding=torch.ones_like(last.is_padding),
        predicts=torch.zeros_like(last.predicts),
    )
    return batches + [empty] * missing
