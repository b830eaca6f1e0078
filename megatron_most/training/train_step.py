"""One training step as a public function.

    parallel.initialize(config.parallel, config.seed)
    state = build_train_state(config)
    result = train_step(state, batches)  # this rank's micro-batches, on its device
    print(result.mean_losses["loss"], result.grad_norm)

Shape letters: M micro-batches of this rank, R rows of the metric table.
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

from megatron_most import platform
from megatron_most.config import RunConfig
from megatron_most.data.loading.batch import Batch
from megatron_most.errors import MostError
from megatron_most.model import MoSTModel, build_model
from megatron_most.model.fp8 import discard_fp8_step, end_fp8_step
from megatron_most.moe import choose_routing, discard_routing_step, end_routing_step
from megatron_most.training.loss import LossTable
from megatron_most.training.metrics import mean_losses
from megatron_most.training.microbatches import run_microbatches, sum_over_ranks
from megatron_most.training.optimizer import build_optimizer, build_scheduler, wrap_model
from megatron_most.training.part_norms import part_grad_norms


@dataclass
class TrainState:
    """The state of training on this rank.

    Args:
        model_chunks: one for each virtual pipeline stage of this rank.
        wrapped: the same in Megatron's ``DistributedDataParallel``, which holds their gradients.
        step: steps taken, including the skipped ones.
        skipped_steps: steps that did not update the weights because their gradient norm was too large, or their loss or
            gradient norm not finite.
        nonfinite_steps: how many steps in a row, up to the last one, had a loss or gradient norm that is not finite.
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
    nonfinite_steps: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0


class NonFiniteStep(MostError):
    """The loss or the gradient norm of a step is not finite, and the run may not skip the step.

    Args:
        reason: what is not finite.
        own_losses: see :class:`StepResult`. None if other ranks may have found a finite norm.
    """

    def __init__(self, message: str, reason: str, own_losses: torch.Tensor | None) -> None:
        super().__init__(message)
        self.reason, self.own_losses = reason, own_losses


@dataclass(frozen=True)
class StepResult:
    """The result of a step, the same on every rank.

    Args:
        names: the ``R`` rows of the metric table (:class:`~megatron_most.training.loss.LossTable`).
        sums: ``[R][2]``, sum and count of each row over all ranks.
        grad_norm: before clipping; NaN if the loss is not finite.
        part_grad_norms: the norm of each trainable part, if requested and if the step is finite.
        skip_reason: why the weights were not updated; empty if they were.
        is_finite: whether loss and gradient norm are. A step for which they are not is skipped.
        votes: the votes given to :func:`train_step`, summed over ranks.
        own_losses: ``[M, 2]`` float64 on the device, sum and count of the loss in each micro-batch of this rank; zero
            on ranks that compute no loss. Not the same on every rank.
    """

    names: Sequence[str]
    sums: list[list[float]]
    grad_norm: float
    part_grad_norms: dict[str, float]
    skip_reason: str
    is_finite: bool
    votes: list[float]
    own_losses: torch.Tensor

    @property
    def is_skipped(self) -> bool:
        """Whether the weights were not updated."""
        return bool(self.skip_reason)

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
    choose_routing(config, chunks)
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
    """Compute the gradients of the global batch; return the tables of :func:`run_microbatches`. Collective.

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
        NonFiniteStep: the loss or the gradient norm is not finite, and so were those of the last
            ``training.skip_nonfinite_steps`` steps. Raised on every rank.
    """
    tables = compute_gradients(state, batches)
    ballots = tables.new_zeros(len(votes), 2)
    for ballot, vote in zip(ballots, votes, strict=True):
        if vote:
            ballot[0].fill_(vote)  # copying a list to the device would make the host wait for it
    totals = sum_over_ranks(tables, ballots)
    sums, counted = totals[: len(state.loss_table.names)], totals[len(state.loss_table.names) :]
    own_losses = tables[:, 0]
    loss, grad_norm, part_norms = sums[0][0], math.nan, {}
    if math.isfinite(loss):
        if wants_part_grad_norms:
            part_norms = part_grad_norms(state.config, state.wrapped, state.optimizer)
        grad_norm, skip_reason = update_weights(state, own_losses)
    else:
        skip_reason = _skip(state, f"the loss is {loss}", own_losses)
    is_finite = math.isfinite(grad_norm)
    result = StepResult(
        names=state.loss_table.names,
        sums=sums,
        grad_norm=grad_norm,
        part_grad_norms=part_norms if is_finite else {},
        skip_reason=skip_reason,
        is_finite=is_finite,
        votes=[total for total, _ in counted],
        own_losses=own_losses,
    )
    state.consumed_tokens += result.num_tokens
    state.consumed_samples += result.num_samples
    return result


def update_weights(state: TrainState, own_losses: torch.Tensor | None = None) -> tuple[float, str]:
    """Update the weights with the current gradients and count the step. Collective.

    Args:
        own_losses: for the error.

    Returns:
        The gradient norm before clipping, and why the update was skipped (empty if it was not).

    Raises:
        NonFiniteStep: see :func:`train_step`.
    """
    if state.config.training.skip_nonfinite_steps:
        # Megatron computes the norm only with the update, and does not skip one for a norm that is NaN.
        norms = _sum_of_grad_norms(state)
        if not math.isfinite(norms):
            return norms, _skip(state, f"the gradient norm is {norms}", own_losses)
    _advance_schedule(state)
    _, grad_norm, _ = state.optimizer.step()
    if not math.isfinite(grad_norm):
        # Ranks whose gradients were damaged may be the only ones that see it.
        raise _too_many(state, f"the gradient norm is {grad_norm}", None)
    end_routing_step(state.model_chunks)
    end_fp8_step(state.model_chunks)
    state.step += 1
    state.nonfinite_steps = 0
    threshold = state.config.optimizer.grad_norm_skip_threshold
    if threshold is None or grad_norm <= threshold:
        return grad_norm, ""
    state.skipped_steps += 1  # Megatron's optimizer compared the same norm
    return grad_norm, f"the gradient norm, {grad_norm:.3f}, exceeds optimizer.grad_norm_skip_threshold, {threshold:g}"


@torch.no_grad()
def gather_weights(state: TrainState) -> None:
    """Complete this rank's weights, before anything but a forward pass of the model reads them. Collective.

    With ``optimizer.overlap_param_gather``, a step leaves each rank with new values only for the weights whose
    optimizer state it holds. The next forward pass, also one of validation, gathers the others.
    """
    if state.config.optimizer.overlap_param_gather:
        for chunk in state.wrapped:
            chunk.start_param_sync(force_sync=True)


def _sum_of_grad_norms(state: TrainState) -> float:
    """The norms of the current gradients as each rank computes them, added up: finite only if all are. Collective."""
    state.optimizer.prepare_grads()
    norms = torch.tensor([state.optimizer.get_grad_norm()], dtype=torch.float64, device=platform.device())
    dist.all_reduce(norms)
    return norms.item()


def _skip(state: TrainState, what: str, own_losses: torch.Tensor | None) -> str:
    """Count a step that is not finite, and forget what it did. Returns ``what``, the reason."""
    if state.nonfinite_steps >= state.config.training.skip_nonfinite_steps:
        raise _too_many(state, what, own_losses)
    _advance_schedule(state)  # as before an update that Megatron skips; the next step does not advance it again
    discard_routing_step(state.model_chunks)
    discard_fp8_step(state.model_chunks)
    state.step += 1
    state.skipped_steps += 1
    state.nonfinite_steps += 1
    return what


def _advance_schedule(state: TrainState) -> None:
    """Set the rate of the next update, which depends on the number of updates: skipped steps do not count."""
    state.scheduler.step(state.step - state.skipped_steps + 1 - state.scheduler.num_steps)


def _too_many(state: TrainState, what: str, own_losses: torch.Tensor | None) -> NonFiniteStep:
    skipped = state.nonfinite_steps
    after = f", after {skipped} such steps in a row were skipped (training.skip_nonfinite_steps)" if skipped else ""
    return NonFiniteStep(
        f"step {state.step + 1}: {what}{after}; nothing of this step was saved: lower optimizer.lr, or look at the data"
        " of this step",
        what,
        own_losses,
    )
