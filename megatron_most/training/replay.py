"""Runs one recorded batch alone: forward and backward, its losses and gradient norms; nothing is trained or written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_most import parallel, platform
from megatron_most.checkpointing import complete_checkpoints, load_model_weights
from megatron_most.checkpointing.directory import step_of
from megatron_most.config import RunConfig, with_new_names
from megatron_most.config.load import build_config
from megatron_most.data.loading.loader import train_batches, train_rows
from megatron_most.errors import ConfigError, DataError
from megatron_most.files import read_json
from megatron_most.model import MoSTModel, check_libraries
from megatron_most.parallel import on_rank_zero, together
from megatron_most.training.failed_batches import describe_rows, gather_losses
from megatron_most.training.metrics import mean_losses
from megatron_most.training.microbatches import stage, sum_over_ranks
from megatron_most.training.muon import check_muon
from megatron_most.training.part_norms import part_grad_norms
from megatron_most.training.train_step import TrainState, build_train_state, compute_gradients

_MAX_DOCUMENTS = 8
"""So many documents of a row are named on the console."""


@dataclasses.dataclass(frozen=True)
class FailedBatch:
    """A record of :class:`~megatron_most.training.failed_batches.FailedBatches`, and the configuration to run it with.

    ``rows`` is the result of :func:`~megatron_most.training.failed_batches.describe_rows`. ``load`` is the
    ``checkpoint.load`` of the command line, None if it has none.
    """

    path: str
    step: int
    reason: str
    rows: list[dict[str, Any]]
    config: RunConfig
    load: str | None

    @property
    def first(self) -> int:
        """The number of its first row."""
        return self.rows[0]["row"]


def read_failed_batch(path: str, overrides: Sequence[str] = ()) -> FailedBatch:
    """Read a record; ``overrides`` change its configuration, for example to another parallel layout.

    Raises:
        ConfigError: the file is no record, or an override is wrong.
    """
    values = read_json(path)
    step, reason, rows, config = (values.get(name) for name in ("step", "reason", "rows", "config"))
    if not (
        isinstance(step, int)
        and isinstance(reason, str)
        and isinstance(config, dict)
        and isinstance(rows, list)
        and rows
        and all(isinstance(row, dict) and type(row.get("row")) is int and row["row"] >= 0 for row in rows)
    ):
        raise ConfigError(f"{path}: not the record of a batch that a run wrote to failed_batches/")
    recorded = build_config(path, with_new_names(config))
    changed = build_config(path, with_new_names(config), overrides)
    load = changed.checkpoint.load
    return FailedBatch(path, step, reason, rows, changed, None if load == recorded.checkpoint.load else load)


def replay(batch: FailedBatch) -> None:
    """Compute losses and gradients of the batch and print them. Any parallel layout gives the same.

    The weights are those of ``checkpoint.load``, if the command line has it; otherwise those of the run's newest
    checkpoint from before the step, or what the run started from.

    Raises:
        DataError: the rows no longer hold the recorded documents.
    """
    config = batch.config
    platform.install()
    platform.set_threads(config.training.threads_per_rank)
    parallel.initialize(config.parallel, config.seed)
    together(lambda: check_libraries(config))
    together(lambda: check_muon(config))
    rows = together(lambda: train_rows(config))
    together(lambda: _require_same_rows(batch, describe_rows(rows, config, batch.first)))
    weights = on_rank_zero(lambda: _weights(batch))
    dp_rank, dp_size = parallel.data_parallel_place()
    stream = train_batches(config, dp_rank=dp_rank, dp_size=dp_size, consumed_samples=batch.first, rows=rows)
    microbatches = together(lambda: [next(stream) for _ in range(config.num_microbatches(dp_size))])

    def load_weights(chunks: list[MoSTModel]) -> None:
        if weights is not None:
            load_model_weights(weights, config, chunks)

    state = build_train_state(config, load_weights)
    tables = compute_gradients(state, [stage(microbatch, platform.device()) for microbatch in microbatches])
    lines = [
        f"step {batch.step} of {config.run_dir}: {batch.reason}; weights: {weights or 'as initialized'}",
        *_describe_losses(batch, gather_losses(tables[:, 0])),
        *_describe_step(state, sum_over_ranks(tables)),
    ]
    if dist.get_rank() == 0:
        print("\n".join(lines), flush=True)
    dist.barrier()
    parallel.destroy()


def _require_same_rows(batch: FailedBatch, found: list[dict[str, Any]]) -> None:
    recorded = [{name: value for name, value in row.items() if name != "loss"} for row in batch.rows]
    for theirs, mine in zip(recorded, found, strict=False):
        if theirs != mine:
            raise DataError(
                f"{batch.path}: row {theirs['row']} held documents {theirs.get('documents')} of"
                f" {theirs.get('dataset')}, and would now hold documents {mine['documents']} of {mine['dataset']}: the"
                " data or the configuration changed"
            )
    if len(recorded) != len(found):
        raise DataError(
            f"{batch.path}: training.global_batch_size={len(found)}: must be {len(recorded)}, the rows of the step"
        )


def _weights(batch: FailedBatch) -> str | None:
    """The checkpoint to load; None for new weights."""
    if batch.load is not None:
        return batch.load
    complete, _ = complete_checkpoints(Path(batch.config.run_dir))
    earlier = [path for path in complete if (step_of(path) or 0) < batch.step]
    return str(earlier[-1]) if earlier else batch.config.checkpoint.load


def _describe_losses(batch: FailedBatch, losses: list[float | None]) -> list[str]:
    """A line for each micro-batch: its loss, and the documents of its rows."""
    size, lines = batch.config.training.micro_batch_size, []
    for index, loss in enumerate(losses):
        rows = batch.rows[index * size : (index + 1) * size]
        sources = []
        for row in rows:
            documents = ", ".join(map(str, row["documents"][:_MAX_DOCUMENTS]))
            more = ", ..." if len(row["documents"]) > _MAX_DOCUMENTS else ""
            sources.append(f"row {row['row']}: {row['dataset']} ({row['task']}) documents {documents}{more}")
        lines.append(f"loss {_short(loss)}  {'; '.join(sources)}")
    return lines


def _describe_step(state: TrainState, sums: list[list[float]]) -> list[str]:
    """A line for each loss of the batch and each gradient norm. Collective."""
    norms = part_grad_norms(state.config, state.wrapped, state.optimizer)
    total = math.sqrt(math.fsum(norm**2 for norm in norms.values()))
    losses = mean_losses(state.loss_table.names, sums)
    named = {**losses, "grad_norm": total, **{f"grad_norm/{part}": norm for part, norm in norms.items()}}
    width = max(map(len, named))
    return [f"{name:<{width}}  {_short(value)}" for name, value in named.items()]


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
