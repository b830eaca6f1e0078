"""The training loop: build, resume, step, look, save."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_most import parallel, platform
from megatron_most.checkpointing import (
    CheckpointMetadata,
    CheckpointSave,
    Fingerprint,
    check_same_data,
    complete_checkpoints,
    find_checkpoint,
    load_checkpoint,
    load_model_weights,
    read_metadata,
    save_checkpoint,
)
from megatron_most.config import RunConfig
from megatron_most.data.loading.batch import Batch
from megatron_most.data.loading.loader import train_batches, validation_batches
from megatron_most.errors import DataError, MostError
from megatron_most.model import build_model, check_libraries
from megatron_most.model.fp8 import collect_fp8_padding, end_fp8_step
from megatron_most.moe import collect_routing, end_routing_step
from megatron_most.parallel import fail, on_rank_zero, together
from megatron_most.training.loss import LossTable
from megatron_most.training.metrics import MetricAccumulator, MetricsWriter, require_installed
from megatron_most.training.muon import check_muon
from megatron_most.training.optimizer import (
    build_optimizer,
    build_scheduler,
    learning_rate,
    wrap_model,
)
from megatron_most.training.parts import part_grad_norms
from megatron_most.training.run_directory import check_same_run, claim, device_name, versions
from megatron_most.training.step import run_microbatches, sum_over_ranks
from megatron_most.training.stop import StopRequest
from megatron_most.training.validation import validate


class Trainer:
    """Trains one model in one run directory, from its newest checkpoint if it has one.

    Every rank runs the same program; rank 0 writes. A run that is killed and started again ends with the weights and
    metrics of one that was not disturbed, in the same parallel layout bit for bit.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.run_dir = Path(config.run_dir)
        self.step = 0
        self.consumed_samples = 0
        self.consumed_tokens = 0
        self.skipped_steps = 0
        self.loss_table = LossTable(
            config.vocab, config.model.codebook_weights(config.vocab), config.model.text_loss_weight
        )
        self.accumulator = MetricAccumulator(self.loss_table.names, config.model.moe)
        self._saving: CheckpointSave | None = None
        self._seconds = 0.0
        self._timed_steps = 0
        self._timed_tokens = 0

    def run(self) -> None:
        """Train to ``training.steps`` or until the process is asked to stop; either way the last step is saved.

        Raises:
            MostError: one line for the user, raised on one rank; the others leave with status 1.
        """
        platform.install()
        platform.set_threads(self.config.training.threads_per_rank)
        parallel.initialize(self.config.parallel, self.config.seed)
        self.device = platform.device()
        together(lambda: (check_libraries(self.config), check_muon(self.config)))
        on_rank_zero(lambda: check_same_run(self.config))
        resume_from = on_rank_zero(self._find_checkpoint)
        if resume_from is not None and self._restore_counters(resume_from) >= self.config.training.steps:
            self._say(f"{resume_from}: already trained for training.steps={self.config.training.steps}")
        else:
            # Whatever can be wrong with what the run reads is found before anything is written.
            on_rank_zero(lambda: require_installed(self.config.logging))
            self._open_data(resume_from)
            if resume_from is None and self.config.checkpoint.load is not None:
                on_rank_zero(lambda: find_checkpoint(self.config.checkpoint.load, self.config))
            on_rank_zero(self._claim_run_directory)
            self._build(resume_from)
            self._train()
        dist.barrier()
        parallel.destroy()

    def _claim_run_directory(self) -> None:
        self._lock = claim(self.config, dist.get_world_size(), device_name(self.device))

    def _find_checkpoint(self) -> Path | None:
        complete, problems = complete_checkpoints(self.run_dir)
        for problem in problems:
            print(f"warning: skipped checkpoint {problem}", flush=True)
        return complete[-1] if complete else None

    def _restore_counters(self, checkpoint: Path) -> int:
        metadata = on_rank_zero(lambda: read_metadata(checkpoint))
        self.step, self.consumed_samples = metadata.step, metadata.consumed_samples
        self.consumed_tokens, self.skipped_steps = metadata.consumed_tokens, metadata.skipped_steps
        self.accumulator.load_state(metadata.pending)
        return self.step

    def _open_data(self, resume_from: Path | None) -> None:
        config = self.config
        dp_rank, dp_size = parallel.data_parallel_place()
        self.num_microbatches = config.num_microbatches(dp_size)
        self.batches: Iterator[Batch] = together(
            lambda: train_batches(config, dp_rank=dp_rank, dp_size=dp_size, consumed_samples=self.consumed_samples)
        )
        self.validation_sets: dict[str, list[Batch]] = {}
        if config.training.eval_interval:
            self.validation_sets = together(
                lambda: self._to_device(validation_batches(config, dp_rank=dp_rank, dp_size=dp_size))
            )
        self._fingerprints = on_rank_zero(lambda: (Fingerprint.of_tokenizer(config), Fingerprint.of_codec(config)))
        self._datasets = on_rank_zero(lambda: [Fingerprint.of_dataset(entry.path) for entry in config.data.train])
        if resume_from is not None:
            on_rank_zero(lambda: check_same_data(resume_from, read_metadata(resume_from), self._datasets))

    def _build(self, resume_from: Path | None) -> None:
        config = self.config
        self.model_chunks = build_model(config)
        if resume_from is None and config.checkpoint.load is not None:
            # Before the optimizer takes its fp32 copy of the weights.
            load_model_weights(config.checkpoint.load, config, self.model_chunks)
            self._say(f"starting from the weights of {config.checkpoint.load}")
        self.wrapped = wrap_model(config, self.model_chunks)
        self.optimizer = build_optimizer(config, self.wrapped)
        if resume_from is not None:
            load_checkpoint(resume_from, config, self.model_chunks, self.optimizer)
            self._say(f"resuming from {resume_from}")
        self.scheduler = build_scheduler(config, self.optimizer, self.step - self.skipped_steps)
        self.writer: MetricsWriter | None = None

        def open_writer() -> None:
            self.writer = MetricsWriter(
                self.run_dir,
                config.logging,
                config.training.steps,
                self.step,
                config.vocab.modality_names,
                dataclasses.asdict(config),
            )

        on_rank_zero(open_writer)

    def _to_device(self, datasets: dict[str, list[Batch]]) -> dict[str, list[Batch]]:
        return {name: [batch.to(self.device) for batch in batches] for name, batches in datasets.items()}

    def _train(self) -> None:
        try:
            with StopRequest() as stop:
                saved_at = self._loop(stop)
        except BaseException:
            if self._saving is not None:
                self._saving.abandon()
            raise
        if self.writer is not None:
            self.writer.close()
        if self.step < self.config.training.steps:
            self._say(f"stopped by {stop.signal or 'another rank'} after step {saved_at}, saved; run again to continue")
        else:
            self._say(f"finished {self.config.training.steps} steps in {self.run_dir}")

    def _loop(self, stop: StopRequest) -> int:
        """Steps, and what is due after each; returns the last one, which was saved."""
        training, logging = self.config.training, self.config.logging
        while True:
            began = time.perf_counter()
            last = self.step + 1 == training.steps
            is_logged = self.step == 0 or (self.step + 1) % logging.interval == 0 or last
            grad_norm, part_norms, stopping, is_writing = self._train_step(stop, is_logged)
            self._seconds += time.perf_counter() - began
            if is_logged:
                self._log(grad_norm, part_norms)
            if self._saving is not None and not is_writing and self._saving.advance():
                self._saving = None
            if training.eval_interval and (self.step % training.eval_interval == 0 or last):
                self._validate()
            if self.step % self.config.checkpoint.interval == 0 or last or stopping:
                self._save(is_last=last or stopping)
            if last or stopping:
                return self.step

    def _train_step(self, stop: StopRequest, is_logged: bool) -> tuple[float, dict[str, float], bool, bool]:
        """One optimizer step, which is skipped where its gradients are too large.

        Returns:
            The gradient norm before clipping; that of each part, in a step that is logged; whether any rank was asked
            to stop; whether any was still writing a checkpoint.
        """
        batches = self._read_batches()
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        table = run_microbatches(self.wrapped, batches, self.loss_table)
        # These ride along, so that all ranks stop after the same step and meet over a checkpoint when all can.
        is_writing = self._saving is not None and self._saving.is_busy
        flags = table.new_tensor([[float(bool(stop)), float(is_writing)]])
        *sums, (requests, writing) = sum_over_ranks(torch.cat([table, flags]))
        self._require_finite("loss", sums[0][0])
        # A step that was skipped left the schedule where this one finds it.
        self.scheduler.step(self.step - self.skipped_steps + 1 - self.scheduler.num_steps)
        part_norms = part_grad_norms(self.config, self.optimizer) if is_logged else {}
        _, grad_norm, _ = self.optimizer.step()
        self._require_finite("gradient norm", grad_norm)
        self._count_if_skipped(grad_norm)
        end_routing_step(self.model_chunks)
        end_fp8_step(self.model_chunks)
        self.step += 1
        self.accumulator.add(sums)
        tokens, samples = (int(value) for value in sums[-1])
        self.consumed_tokens += tokens
        self.consumed_samples += samples
        self._timed_tokens += tokens
        self._timed_steps += 1
        return grad_norm, part_norms, requests > 0, writing > 0

    def _count_if_skipped(self, grad_norm: float) -> None:
        """Count a step that Megatron's optimizer skipped, and say so; every rank has the same norm."""
        threshold = self.config.optimizer.grad_norm_skip_threshold
        if threshold is not None and grad_norm > threshold:
            self.skipped_steps += 1
            self._say(
                f"step {self.step + 1}  skipped: the gradient norm, {grad_norm:.3f}, exceeds"
                f" optimizer.grad_norm_skip_threshold, {threshold:g}"
            )

    def _read_batches(self) -> list[Batch]:
        """The micro-batches of this step; of the ranks that share broken rows, one tells it and all leave."""
        try:
            return [next(self.batches).to(self.device) for _ in range(self.num_microbatches)]
        except DataError as error:
            fail(error if parallel.is_first_of_replica() else None)

    def _require_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            error = MostError(
                f"step {self.step + 1}: the {what} is {value}; nothing of this step was saved: lower optimizer.lr, or"
                " look at the data of this step"
            )
            fail(error if dist.get_rank() == 0 else None)

    def _log(self, grad_norm: float, part_norms: dict[str, float]) -> None:
        """Write what was gathered since the last line; loss metrics are sums over targets divided by their number."""
        self._collect()
        values: dict[str, Any] = {
            "step": self.step,
            "time": time.time(),
            "consumed_samples": self.consumed_samples,
            "consumed_tokens": self.consumed_tokens,
            "lr": learning_rate(self.scheduler),
            "grad_norm": grad_norm,
            **({} if self.config.optimizer.grad_norm_skip_threshold is None else {"skipped_steps": self.skipped_steps}),
            **{f"grad_norm/{part}": norm for part, norm in part_norms.items()},
            **self.accumulator.means(),
            "tokens_per_second": self._timed_tokens / self._seconds,
            "step_seconds": self._seconds / self._timed_steps,
        }
        if self.writer is not None:
            self.writer.training(values, self.accumulator.routing.layers())
        self.accumulator.reset()
        self._seconds, self._timed_steps, self._timed_tokens = 0.0, 0, 0

    def _collect(self) -> None:
        """Add up what the layers have counted since the last time."""
        self.accumulator.routing.add(collect_routing(self.model_chunks, self.config.model))
        if self.config.precision.uses_fp8:
            self.accumulator.add_fp8_rows(*collect_fp8_padding(self.model_chunks))

    def _validate(self) -> None:
        losses = validate(self.wrapped, self.validation_sets, self.loss_table)
        if self.writer is not None and losses:
            self.writer.validation(self.step, losses)

    def _save(self, is_last: bool) -> None:
        """Save this step: in the background if training goes on meanwhile, and after a save that is under way."""
        if self._saving is not None:
            self._saving.wait()
            self._saving = None
        self._collect()
        tokenizer, codec = self._fingerprints
        metadata = CheckpointMetadata(
            step=self.step,
            consumed_samples=self.consumed_samples,
            consumed_tokens=self.consumed_tokens,
            config=dataclasses.asdict(self.config),
            tokenizer=tokenizer,
            codec=codec,
            world_size=dist.get_world_size(),
            pending=self.accumulator.state(),
            versions=versions(),
            datasets=self._datasets,
            skipped_steps=self.skipped_steps,
        )
        options = self.config.checkpoint
        arguments = (self.run_dir, metadata, self.model_chunks, self.optimizer, options.keep_last, options.keep_every)
        if options.asynchronous and not is_last:
            self._saving = CheckpointSave(*arguments)
        else:
            save_checkpoint(*arguments)

    def _say(self, line: str) -> None:
        if dist.get_rank() == 0:
            print(line, flush=True)
