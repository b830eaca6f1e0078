"""The training loop: open the data, resume, take steps, and call the hooks around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from megatron_most import parallel, platform
from megatron_most.checkpointing import (
    CheckpointMetadata,
    Fingerprint,
    check_same_data,
    complete_checkpoints,
    find_checkpoint,
    load_checkpoint,
    load_model_weights,
    read_metadata,
)
from megatron_most.config import RunConfig
from megatron_most.data.loading.batch import Batch
from megatron_most.data.loading.blend import Rows
from megatron_most.data.loading.loader import train_batches, train_rows, validation_batches
from megatron_most.data.storage.utterances import require_disjoint
from megatron_most.errors import DataError
from megatron_most.model import MoSTModel, check_libraries
from megatron_most.model.fp8 import collect_fp8_padding
from megatron_most.moe import collect_routing
from megatron_most.parallel import fail, on_rank_zero, together
from megatron_most.training.failed_batches import FailedBatches
from megatron_most.training.metrics import MetricAccumulator, require_installed
from megatron_most.training.microbatches import stage
from megatron_most.training.muon import check_muon
from megatron_most.training.prefetch import Prefetch
from megatron_most.training.replicas import ReplicaCheck
from megatron_most.training.retention import Retention, RetentionText, read_retention_text
from megatron_most.training.run_directory import check_same_run, claim, device_name
from megatron_most.training.step_hooks import Checkpoints, MetricsLog, Profile, StepHook, Validation
from megatron_most.training.stop import StopRequest
from megatron_most.training.train_step import NonFiniteStep, StepResult, build_train_state, train_step
from megatron_most.training.watchdog import STACKS, WAITING_FOR_DATA, Watchdog, gathered_places


class _Resumed(NamedTuple):
    """The checkpoint that a run resumes from."""

    path: Path
    metadata: CheckpointMetadata


class Trainer:
    """Trains one model in one run directory, from its newest checkpoint if there is one.

    All ranks run the same program; rank 0 writes. A run that is killed and started again ends with the weights and
    metrics of an uninterrupted one, bit for bit in the same parallel layout.

    Args:
        hooks: additional hooks. They run after logging and validation, and before the checkpoint of the step.
    """

    def __init__(self, config: RunConfig, hooks: Sequence[StepHook] = ()) -> None:
        self.config = config
        self.run_dir = Path(config.run_dir)
        self.is_stopping = False
        self.is_any_writing = False
        """Whether any rank was writing a checkpoint in the background when the sums of the last step were reduced."""
        self._own_hooks = hooks
        self._step_in_work = 0
        self._has_stepped = False

    @property
    def ends(self) -> bool:
        """Whether the step taken last is the last of this process."""
        return self.is_stopping or self.state.step == self.config.training.train_iters

    def run(self) -> bool:
        """Train to ``training.train_iters`` or until the process is asked to stop, and save the last step.

        Returns:
            Whether the training is complete; False if it was asked to stop, and has saved.

        Raises:
            MostError: a user error, raised on one rank. The others exit with status 1.
        """
        config = self.config
        platform.install()
        platform.set_threads(config.training.threads_per_rank)
        with StopRequest() as stop:
            parallel.initialize(config.parallel, config.seed)
            places = gathered_places()
            with Watchdog(dist.get_rank(), places, self.run_dir, config.parallel.timeout) as self.watchdog:
                self._run(stop)
                self.enter("waiting for the other ranks to end")
                dist.barrier()
        parallel.destroy()
        return not self.is_stopping or self.state.step == config.training.train_iters

    def _run(self, stop: StopRequest) -> None:
        config = self.config
        self.device = platform.device()
        together(lambda: check_libraries(config))
        together(lambda: check_muon(config))
        on_rank_zero(lambda: check_same_run(config))
        resumed = on_rank_zero(self._find_checkpoint)
        if resumed is not None and resumed.metadata.step >= config.training.train_iters:
            self.say(f"{resumed.path}: already trained for training.train_iters={config.training.train_iters}")
        else:
            # Find errors in what the run reads before writing anything.
            on_rank_zero(lambda: require_installed(config.logging))
            self.say("reading the datasets")
            self.enter("opening the data", is_long=True)
            checkpoints, validation_sets = self._open_data(resumed)
            load = config.checkpoint.load
            if resumed is None and load is not None:
                on_rank_zero(lambda: find_checkpoint(load, config))
            on_rank_zero(self._claim_run_directory)
            self.say("building the model")
            self.enter("building the model", is_long=True)
            self._build(resumed)
            log = MetricsLog(self)
            profiles = [Profile(*config.logging.profile_steps)] if config.logging.profile_steps else []
            self.failed_batches = FailedBatches(config, self.rows)
            measured: list[StepHook] = [Validation(log, validation_sets)]
            measured += [Retention(log, self, self.retention_text)] if self.retention_text else []
            own = self._own_hooks
            self.hooks = [*profiles, log, *measured, self.failed_batches, *own, ReplicaCheck(checkpoints), checkpoints]
            self.say("taking the first step, which is slower than the others")
            self._train(log, checkpoints, stop)

    def say(self, line: str) -> None:
        """Print a line on rank 0."""
        if dist.get_rank() == 0:
            print(line, flush=True)

    def enter(self, phase: str, is_long: bool = False) -> None:
        """Say what this rank does from now on, for the watchdog; arguments as in :meth:`Watchdog.enter`."""
        self.watchdog.enter(self._step_in_work, phase, is_long)

    def collect(self) -> None:
        """Add the layers' statistics since the last call to :attr:`accumulator`. Collective."""
        chunks = self.state.model_chunks
        self.accumulator.routing.add(collect_routing(chunks, self.config.model))
        if self.config.precision.uses_fp8:
            self.accumulator.add_fp8_rows(*collect_fp8_padding(chunks))

    def _claim_run_directory(self) -> None:
        self._lock = claim(self.config, dist.get_world_size(), device_name(self.device))

    def _find_checkpoint(self) -> _Resumed | None:
        complete, problems = complete_checkpoints(self.run_dir)
        for problem in problems:
            print(f"warning: skipped checkpoint {problem}", flush=True)
        return _Resumed(complete[-1], read_metadata(complete[-1])) if complete else None

    def _open_data(self, resumed: _Resumed | None) -> tuple[Checkpoints, dict[str, list[Batch]]]:
        """Open the training data at the position of the run.

        Returns:
            The hook that saves checkpoints, with fingerprints of the data, and the batches of each validation set.
        """
        config = self.config
        dp_rank, dp_size = parallel.data_parallel_place()
        consumed = 0 if resumed is None else resumed.metadata.consumed_samples
        self.num_microbatches = config.num_microbatches(dp_size)
        self.rows: Rows = together(lambda: train_rows(config))
        self.batches: Iterator[Batch] = train_batches(
            config, dp_rank=dp_rank, dp_size=dp_size, consumed_samples=consumed, rows=self.rows
        )
        validation_sets: dict[str, list[Batch]] = {}
        if config.training.eval_interval:
            on_rank_zero(lambda: require_disjoint(config.data))
            read = together(lambda: validation_batches(config, dp_rank=dp_rank, dp_size=dp_size))
            validation_sets = {name: [self._stage(batch) for batch in batches] for name, batches in read.items()}
        self.retention_text: RetentionText | None = None
        if config.training.retention.data is not None:
            self.retention_text = together(lambda: read_retention_text(config, dp_rank=dp_rank, dp_size=dp_size))
        tokenizer, codec = on_rank_zero(lambda: (Fingerprint.of_tokenizer(config), Fingerprint.of_codec(config)))
        datasets = on_rank_zero(lambda: [Fingerprint.of_dataset(entry.path) for entry in config.data.train])
        if resumed is not None:
            on_rank_zero(lambda: check_same_data(resumed.path, resumed.metadata, datasets))
        return Checkpoints(tokenizer, codec, datasets), validation_sets

    def _build(self, resumed: _Resumed | None) -> None:
        config = self.config

        def load_weights(chunks: list[MoSTModel]) -> None:
            if config.checkpoint.load is not None:
                load_model_weights(config.checkpoint.load, config, chunks)
                self.say(f"starting from the weights of {config.checkpoint.load}")

        if resumed is None:
            self.state = build_train_state(config, load_weights)
            self.accumulator = MetricAccumulator(self.state.loss_table.names, config.model.moe)
            return
        metadata = resumed.metadata
        self.state = state = build_train_state(config, num_updates=metadata.num_updates)
        load_checkpoint(resumed.path, config, state.model_chunks, state.optimizer)
        state.step = metadata.step
        state.skipped_steps, state.nonfinite_steps = metadata.skipped_steps, metadata.nonfinite_steps
        state.consumed_samples, state.consumed_tokens = metadata.consumed_samples, metadata.consumed_tokens
        self.accumulator = MetricAccumulator(state.loss_table.names, config.model.moe)
        self.accumulator.load_state(metadata.pending)
        self.say(f"resuming from {resumed.path}")

    def _stage(self, batch: Batch) -> Batch:
        return stage(batch, self.device)

    def _train(self, log: MetricsLog, checkpoints: Checkpoints, stop: StopRequest) -> None:
        timeout = self.config.parallel.timeout.total_seconds()
        try:
            # Prepares the batches of the next step while this one runs.
            with Prefetch(self.batches, self._stage, self.num_microbatches, timeout) as batches:
                while not self.ends:
                    self._step_in_work = self.state.step + 1
                    for hook in self.hooks:
                        self.enter(f"before the step: {type(hook).__name__}")
                        hook.before_step(self)
                    result = self._step(batches, log, checkpoints, stop)
                    for hook in self.hooks:
                        self.enter(f"after the step: {type(hook).__name__}", hook.is_long)
                        hook.after_step(self, result)
        except BaseException:
            for hook in self.hooks:
                hook.abandon()
            raise
        for hook in self.hooks:
            self.enter(f"end of the run: {type(hook).__name__}", hook.is_long)
            hook.close()
        steps = self.config.training.train_iters
        if self.state.step < steps:
            who = stop.signal or "another rank"
            self.say(f"stopped by {who} after step {self.state.step}, saved; run again to continue")
        else:
            self.say(f"finished {steps} steps in {self.run_dir}")

    def _step(
        self, batches: Iterator[Batch], log: MetricsLog, checkpoints: Checkpoints, stop: StopRequest
    ) -> StepResult:
        # Reduced with the metrics: all ranks stop after the same step, and commit a checkpoint when all have written.
        votes = (float(bool(stop)), float(checkpoints.is_busy))
        is_logged = log.is_due(self.state.step + 1)
        taken = self._take(batches)
        self.enter("forward, backward and update", is_long=not self._has_stepped)  # kernels are compiled in the first
        try:
            result = train_step(self.state, taken, votes, wants_part_grad_norms=is_logged)
        except NonFiniteStep as error:
            if error.own_losses is not None:
                self.enter("completing the save", is_long=True)
                checkpoints.finish()  # every rank is here, and the earlier step that is being saved was good
            self.failed_batches.end(self, error)
        self._has_stepped = True
        requests, writing = result.votes
        self.is_stopping, self.is_any_writing = requests > 0, writing > 0
        if result.is_skipped:
            self.say(f"step {self.state.step}  skipped: {result.skip_reason}")
        return result

    def _take(self, batches: Iterator[Batch]) -> list[Batch]:
        """The micro-batches of this step. All ranks that read a broken row exit; one of them reports it."""
        self.enter(WAITING_FOR_DATA)
        try:
            return [next(batches) for _ in range(self.num_microbatches)]
        except DataError as error:
            fail(error if parallel.is_first_of_replica() else None)
        except TimeoutError:
            minutes = self.config.parallel.distributed_timeout_minutes
            raise DataError(
                f"{self.watchdog.where()}: no batch within parallel.distributed_timeout_minutes={minutes:g}; stacks of"
                f" the loader: {self.run_dir / STACKS}"
            ) from None
