"""Records which documents a step read whose loss is not finite or much larger than before.

The order of data is deterministic, so the number of rows consumed before a step tells its documents: nothing of this is
carried along with the batches. ``most train --replay FILE`` runs such a batch again
(:mod:`megatron_most.training.replay`).

Shape letters: M micro-batches of this rank.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist

from megatron_most import parallel
from megatron_most.config import RunConfig
from megatron_most.data.loading.blend import Rows
from megatron_most.errors import MostError
from megatron_most.files import write_json
from megatron_most.training.step_hooks import StepHook
from megatron_most.training.train_step import NonFiniteStep, StepResult

if TYPE_CHECKING:
    from megatron_most.training.trainer import Trainer

FAILED_BATCHES = "failed_batches"
"""Folder of the records in a run directory."""

_WINDOW = 32
_LEAST = 8
"""A loss is compared with the median of the last ``_WINDOW`` steps of this process, once there are ``_LEAST``."""


class FailedBatches(StepHook):
    """Writes a record of each step that is skipped because it is not finite, that ends the run, or whose loss spikes.

    Args:
        rows: the training rows.
    """

    def __init__(self, config: RunConfig, rows: Rows) -> None:
        self._config, self._rows = config, rows
        self._losses: deque[float] = deque(maxlen=_WINDOW)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        reason = "" if result.is_finite else result.skip_reason
        if result.is_finite and "loss" in result.mean_losses:
            loss = result.mean_losses["loss"]
            reason = self._spike(loss)
            self._losses.append(loss)
        if reason:
            first = trainer.state.consumed_samples - self._config.training.global_batch_size
            saved = self._record(trainer.state.step, reason, first, result.own_losses)
            trainer.say(f"step {trainer.state.step}  {reason}; {saved}")

    def end(self, trainer: Trainer, error: NonFiniteStep) -> NoReturn:
        """End the run with ``error``, which also names the record of the batch.

        Call it on every rank that has the error. Rank 0, which reports it, may not be one of them (``own_losses`` is
        None): torchrun then reports what the others leave.
        """
        saved = self._record(trainer.state.step + 1, error.reason, trainer.state.consumed_samples, error.own_losses)
        parallel.fail(
            MostError(f"{error}; {saved}") if dist.get_rank() == 0 else None,
            unless_told=str(error) if error.own_losses is None else "",
        )

    def _spike(self, loss: float) -> str:
        """Why ``loss`` counts as a spike; empty if it does not."""
        factor = self._config.training.spiky_loss_factor
        if factor is None or len(self._losses) < _LEAST:
            return ""
        median = statistics.median(self._losses)
        if loss <= factor * median:
            return ""
        return (
            f"the loss, {loss:.4f}, exceeds training.spiky_loss_factor={factor:g} times {median:.4f}, the median of the"
            f" last {len(self._losses)} steps"
        )

    def _record(self, step: int, reason: str, first: int, own_losses: torch.Tensor | None) -> str:
        """Write the record on rank 0. Collective, unless ``own_losses`` is None.

        Returns:
            On rank 0, what to tell the user. A failure to write must not hide the reason, so it is told as well.
        """
        losses = None if own_losses is None else gather_losses(own_losses)
        if dist.get_rank() != 0:
            return ""
        config = self._config
        rows = describe_rows(self._rows, config, first, losses)
        path = Path(config.run_dir) / FAILED_BATCHES / f"step_{step:08d}.json"
        content = {"step": step, "reason": reason, "rows": rows, "config": dataclasses.asdict(config)}
        try:
            path.parent.mkdir(exist_ok=True)
            write_json(path, content)
        except (MostError, OSError) as error:
            return f"which documents it read could not be written: {error}"
        return f"{path} names the documents that it read; run them alone with: most train --replay {path}"


def gather_losses(own_losses: torch.Tensor) -> list[float | None]:
    """The mean loss of every micro-batch of a step, in the order of its rows. Collective.

    Args:
        own_losses: ``[M, 2]``, see :class:`~megatron_most.training.train_step.StepResult`.

    Returns:
        The same on every rank: NaN or infinity where the loss is not finite, None without a target.
    """
    dp_rank, dp_size = parallel.data_parallel_place()
    sums = own_losses.new_zeros(len(own_losses), dp_size, 2)
    sums[:, dp_rank] = own_losses
    dist.all_reduce(sums)
    return [total / count if count else None for total, count in sums.flatten(0, 1).tolist()]


def describe_rows(
    rows: Rows, config: RunConfig, first: int, losses: list[float | None] | None = None
) -> list[dict[str, Any]]:
    """The sources of each row of the step whose first row is ``first``; with ``losses``, those of their micro-batches.

    JSON has no NaN and infinity, so such a loss is a string.
    """
    size, found = config.training.micro_batch_size, []
    for index in range(config.training.global_batch_size):
        row = dataclasses.asdict(rows.sources(first + index))
        if losses is not None:
            loss = losses[index // size]
            row["loss"] = loss if loss is None or math.isfinite(loss) else str(loss)
        found.append(row)
    return found
