"""One training step as a public function.

    parallel.initialize(config.parallel, config.seed)
    state = build_train_state(config)
    result = train_step(state, batches)  # this rank's micro-batches, on its device
    print(result.mean_losses["loss"], result.grad_norm)

Shape letters: R rows of the metric table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_most.config import RunConfig
from megatron_most.data.loading.batch import Batch
from megatron_most.errors import MostError
from megatron_most.model import MoSTModel, build_model
from megatron_most.model.fp8 import end_fp8_step
from megatron_most.moe import end_routing_step
from megatron_most.parallel import fail
from megatron_most.training.loss import LossTable
from megatron_most.training.metrics import mean_losses
from megatron_most.training.microbatches import run_microbatches, sum_over_ranks
from megatron_most.training.optimizer import build_optimizer, build_scheduler, wrap_model
from megatron_most.training.parts import part_grad_norms


@dataclass
class TrainState:
    """The state of training on this rank.

    Args:
        model_chunks: one for each virtual pipeline stage of this rank.
        wrapped: the same in Megatron's ``DistributedDataParallel``, which holds their gradients.
        step: steps taken, including the skipped ones.
        skipped_steps: steps that did not update the weights because their gradient norm was too large.
        consumed_samples, consumed_tokens: rows, and positions that are not padding, over all ranks.
    """

    config: RunConfig
    model_chunks: list[MoSTModel]
    wrapped: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    loss_table: LossTable
    step: int = 0
    skipped_steps: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0


@dataclass(frozen=True)
class StepResult:
    """The result of a step, the same on every rank.

    Args:
        names: the ``R`` rows of the metric table (:class:`~megatron_most.training.loss.LossTable`).
        sums: ``[R][2]``, sum and count of each row over all ranks.
        grad_norm: before clipping.
        part_grad_norms: the norm of each trainable part, if requested.
        is_skipped: whether ``optimizer.grad_norm_skip_threshold`` was exceeded and the weights were not updated.
        votes: the votes given to :func:`train_step`, summed over ranks.
    """

    names: Sequence[str]
    sums: list[list[float]]
    grad_norm: float
    part_grad_norms: dict[str, float]
    is_skipped: bool
    votes: list[float]

    @property
    def mean_losses(self) -> dict[str, float]:
        """Sum / count of each loss that had a target."""
        return mean_losses(self.names, self.sums)

    @property
    def num_tokens(self) -> int:
        """Positions that are not padding, over all ranks."""
        return int(self.sums[-1][0])

    @property
    def num_samples(self) -> int:
        """Rows, over all ranks."""
        return int(self.sums[-1][1])


def build_train_state(
    config: RunConfig, load_weights: Callable[[list[MoSTModel]], None] | None = None, num_updates: int = 0
) -> TrainState:
    """Build model, optimizer, and schedule. Call :func:`megatron_most.parallel.initialize` first. Collective.

    Args:
        load_weights: loads weights into the new model, before the optimizer copies them to fp32.
        num_updates: updates that the learning-rate schedule has behind it.

    Raises:
        ConfigError: a library that the configuration needs is missing.
    """
    chunks = build_model(config)
    if load_weights is not None:
        load_weights(chunks)
    wrapped = wrap_model(config, chunks)
    optimizer = build_optimizer(config, wrapped)
    return TrainState(
        config=config,
        model_chunks=chunks,
        wrapped=wrapped,
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer, num_updates),
        loss_table=LossTable(config.vocab, config.model.codebook_weights(config.vocab), config.model.text_loss_weight),
    )


def compute_gradients(state: TrainState, batches: list[Batch]) -> torch.Tensor:
    """Compute the gradients of the global batch; return the table of :func:`run_microbatches`. Collective.

    Args:
        batches: this rank's micro-batches, on its device; every data-parallel rank has the same number.
    """
    for chunk in state.wrapped:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    return run_microbatches(state.wrapped, batches, state.loss_table)


def train_step(
    state: TrainState, batches: list[Batch], votes: Sequence[float] = (), wants_part_grad_norms: bool = False
) -> StepResult:
    """Compute gradients and update weights, schedule, expert biases, and FP8 histories. Collective.

    With ``optimizer.overlap_param_gather``, call :func:`gather_weights` before you read the weights.

    Args:
        batches: see :func:`compute_gradients`.
        votes: numbers to sum over ranks in the same reduction as the metrics, so that ranks can agree on something.
        wants_part_grad_norms: also compute the gradient norm of each part, which takes another reduction.

    Raises:
        MostError: the loss or the gradient norm is not finite. Raised on rank 0; the others exit with status 1.
    """
    table = compute_gradients(state, batches)
    ballots = table.new_zeros(len(votes), 2)
    for ballot, vote in zip(ballots, votes, strict=True):
        if vote:
            ballot[0].fill_(vote)  # copying a list to the device would make the host wait for it
    totals = sum_over_ranks(torch.cat([table, ballots]))
    sums, counted = totals[: len(table)], totals[len(table) :]
    _require_finite(state, "loss", sums[0][0])
    part_norms = part_grad_norms(state.config, state.optimizer) if wants_part_grad_norms else {}
    skipped_before = state.skipped_steps
    grad_norm = update_weights(state)
    result = StepResult(
        names=state.loss_table.names,
        sums=sums,
        grad_norm=grad_norm,
        part_grad_norms=part_norms,
        is_skipped=state.skipped_steps > skipped_before,
        votes=[total for total, _ in counted],
    )
    state.consumed_tokens += result.num_tokens
    state.consumed_samples += result.num_samples
    return result


def update_weights(state: TrainState) -> float:
    """Update the weights with the current gradients and count the step. Collective.

    Returns:
        The gradient norm before clipping.

    Raises:
        MostError: the norm is not finite; see :func:`train_step`.
    """
    # The rate depends on the number of updates: a skipped step does not advance the schedule.
    state.scheduler.step(state.step - state.skipped_steps + 1 - state.scheduler.num_steps)
    _, grad_norm, _ = state.optimizer.step()
    _require_finite(state, "gradient norm", grad_norm)
    end_routing_step(state.model_chunks)
    end_fp8_step(state.model_chunks)
    state.step += 1
    threshold = state.config.optimizer.grad_norm_skip_threshold
    if threshold is not None and grad_norm > threshold:
        state.skipped_steps += 1  # Megatron's optimizer compared the same norm
    return grad_norm


@torch.no_grad()
def gather_weights(state: TrainState) -> None:
    """Complete this rank's weights, before anything but a forward pass of the model reads them. Collective.

    With ``optimizer.overlap_param_gather``, a step leaves each rank with new values only for the weights whose
    optimizer state it holds. The next forward pass, also one of validation, gathers the others.
    """
    if state.config.optimizer.overlap_param_gather:
        for chunk in state.wrapped:
            chunk.start_param_sync(force_sync=True)


def _require_finite(state: TrainState, what: str, value: float) -> None:
    if not math.isfinite(value):
        error = MostError(
            f"step {state.step + 1}: the {what} is {value}; nothing of this step was saved: lower optimizer.lr, or"
            " look at the data of this step"
        )
        fail(error if dist.get_rank() == 0 else None)
