"""Hooks that the trainer calls around every step: metrics, validation, checkpoints, profiles.

Add your own without changing the trainer::

    class PrintLoss(StepHook):
        def after_step(self, trainer, result):
            trainer.say(f"{trainer.state.step}: {result.mean_losses['loss']:.3f}")

    Trainer(config, hooks=[PrintLoss()]).run()
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from megatron_most import platform
from megatron_most.checkpointing import CheckpointMetadata, CheckpointSave, Fingerprint, save_checkpoint
from megatron_most.data.loading.batch import Batch
from megatron_most.parallel import on_rank_zero
from megatron_most.training.metrics import MetricsWriter
from megatron_most.training.optimizer import learning_rate
from megatron_most.training.run_directory import versions
from megatron_most.training.train_step import StepResult, gather_weights
from megatron_most.training.validation import validate

if TYPE_CHECKING:
    from megatron_most.training.trainer import Trainer


class StepHook:
    """Base class of hooks. Every rank calls them, in the order of the trainer's list; override what you need.

    A hook that reads weights calls :func:`~megatron_most.training.train_step.gather_weights` first.
    """

    is_long = False
    """Whether it may take minutes: the watchdog is more patient with it."""

    def before_step(self, trainer: Trainer) -> None:
        """Called before a step reads its batches. ``trainer.state.step`` is the number of steps taken."""

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Called after a step. ``trainer.state.step`` includes it; ``trainer.ends`` is True after the last one."""

    def close(self) -> None:
        """Called once at the end of the run, unless an exception ends it."""

    def abandon(self) -> None:
        """Called once if an exception ends the run."""


class MetricsLog(StepHook):
    """Logs to ``metrics.jsonl``, ``routing.jsonl``, the console, TensorBoard, and wandb. Construction is collective."""

    def __init__(self, trainer: Trainer) -> None:
        config = trainer.config
        self.interval, self.num_steps = config.logging.log_interval, config.training.train_iters
        self.writer: MetricsWriter | None = None
        self._began = self._seconds = 0.0
        self._steps = self._tokens = 0

        def open_writer() -> None:
            self.writer = MetricsWriter(
                trainer.run_dir,
                config.logging,
                config.training.train_iters,
                trainer.state.step or -1,  # a run from the start keeps no line, not even one of step 0
                config.vocab.modality_names,
                dataclasses.asdict(config),
            )

        on_rank_zero(open_writer)

    def is_due(self, step: int) -> bool:
        return step == 1 or step % self.interval == 0 or step == self.num_steps

    def before_step(self, trainer: Trainer) -> None:
        self._began = time.perf_counter()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        self._seconds += time.perf_counter() - self._began
        self._steps += 1
        self._tokens += result.num_tokens
        trainer.accumulator.add(result.sums, result.is_finite)
        if self.is_due(trainer.state.step):
            self._log(trainer, result)

    def _log(self, trainer: Trainer, result: StepResult) -> None:
        """Write the metrics since the last line."""
        state = trainer.state
        trainer.collect()
        may_skip = state.config.training.skip_nonfinite_steps
        may_skip |= state.config.optimizer.grad_norm_skip_threshold is not None
        values: dict[str, Any] = {
            "step": state.step,
            "time": time.time(),
            "consumed_samples": state.consumed_samples,
            "consumed_tokens": state.consumed_tokens,
            "lr": learning_rate(state.scheduler),
            **({"grad_norm": result.grad_norm} if result.is_finite else {}),
            **({"skipped_steps": state.skipped_steps} if may_skip else {}),
            **{f"grad_norm/{part}": norm for part, norm in result.part_grad_norms.items()},
            **trainer.accumulator.means(),
            "tokens_per_second": self._tokens / self._seconds,
            "step_seconds": self._seconds / self._steps,
            "max_memory_bytes": platform.peak_memory(),
        }
        if self.writer is not None:
            self.writer.training(values, trainer.accumulator.routing.layers())
        trainer.accumulator.reset()
        self._seconds, self._steps, self._tokens = 0.0, 0, 0

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class Validation(StepHook):
    """Computes losses on the validation sets, every ``training.eval_interval`` steps and at the end of training.

    Args:
        datasets: this rank's batches of each dataset, on its device.
    """

    is_long = True

    def __init__(self, log: MetricsLog, datasets: dict[str, list[Batch]]) -> None:
        self._log, self._datasets = log, datasets

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        state, training = trainer.state, trainer.config.training
        if not training.eval_interval or (state.step % training.eval_interval and state.step != training.train_iters):
            return
        losses: dict[str, float] = {}
        for name, batches in self._datasets.items():
            trainer.enter(f"validation on {name}", self.is_long)
            losses |= validate(state.wrapped, {name: batches}, state.loss_table)
        if self._log.writer is not None and losses:
            self._log.writer.validation(state.step, losses)


class Checkpoints(StepHook):
    """Saves every ``checkpoint.save_interval`` steps and after the last one, in the background if so configured.

    Args:
        tokenizer, codec, datasets: fingerprints to store in the checkpoints.
    """

    is_long = True

    def __init__(self, tokenizer: Fingerprint | None, codec: Fingerprint | None, datasets: list[Fingerprint]) -> None:
        self._tokenizer, self._codec, self._datasets = tokenizer, codec, datasets
        self._saving: CheckpointSave | None = None

    @property
    def is_busy(self) -> bool:
        """Whether this rank is still writing. Committing the checkpoint earlier would make the other ranks wait."""
        return self._saving is not None and self._saving.is_busy

    def is_due(self, trainer: Trainer) -> bool:
        """Whether the step taken last is saved."""
        return trainer.ends or trainer.state.step % trainer.config.checkpoint.save_interval == 0

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if self._saving is not None and not trainer.is_any_writing and self._saving.advance():
            self._saving = None
        if self.is_due(trainer):
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        """Save this step. Waits for the previous save."""
        self.finish()
        trainer.collect()
        gather_weights(trainer.state)
        state, options = trainer.state, trainer.config.checkpoint
        metadata = CheckpointMetadata(
            step=state.step,
            consumed_samples=state.consumed_samples,
            consumed_tokens=state.consumed_tokens,
            config=dataclasses.asdict(trainer.config),
            tokenizer=self._tokenizer,
            codec=self._codec,
            world_size=dist.get_world_size(),
            pending=trainer.accumulator.state(),
            versions=versions(),
            datasets=self._datasets,
            skipped_steps=state.skipped_steps,
            nonfinite_steps=state.nonfinite_steps,
        )
        arguments = (
            trainer.run_dir,
            metadata,
            state.model_chunks,
            state.optimizer,
            options.keep_last,
            options.save_retain_interval,
        )
        if options.async_save and not trainer.ends:
            self._saving = CheckpointSave(*arguments)
        else:
            save_checkpoint(*arguments)

    def finish(self) -> None:
        """Complete the save in progress, if there is one. Collective."""
        if self._saving is not None:
            self._saving.wait()
            self._saving = None

    def abandon(self) -> None:
        if self._saving is not None:
            self._saving.abandon()


class Profile(StepHook):
    """Profiles the steps ``first`` to ``last`` on rank 0 with torch's profiler.

    Writes a trace for Perfetto or ``chrome://tracing`` to ``<run_dir>/profile/steps_<first>_<last>.json.gz``.
    """

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self._profile: profile | None = None

    def before_step(self, trainer: Trainer) -> None:
        if trainer.state.step + 1 == self.first and dist.get_rank() == 0:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profile = profile(activities=activities)
            self._profile.start()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if self._profile is None or not (trainer.state.step == self.last or trainer.ends):
            return
        self._profile.stop()
        folder = trainer.run_dir / "profile"
        folder.mkdir(exist_ok=True)
        path = folder / f"steps_{self.first}_{trainer.state.step}.json.gz"
        temporary = path.with_name(f".tmp-{path.name}")
        self._profile.export_chrome_trace(str(temporary))
        temporary.rename(path)
        self._profile = None
        trainer.say(f"profile of steps {self.first} to {trainer.state.step}: {path}")
