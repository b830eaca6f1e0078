"""Hooks around a step, the profiler among them, and a step called without a trainer."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from megatron_most import parallel
from megatron_most.errors import ConfigError, MostError
from megatron_most.training import StepHook, StepResult, Trainer, build_train_state, train_step
from tests.distributed.harness import run_ranks
from tests.distributed.observe import mixed_batches, own_share
from tests.distributed.shards import fill_weights
from tests.distributed.tiny import tiny_config
from tests.integration.tiny_run import metric_lines, run_config, train


class Recorder(StepHook):
    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.losses: list[float] = []

    def before_step(self, trainer: Trainer) -> None:
        self.events.append(("before", trainer.state.step))

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        self.events.append(("after, the last" if trainer.ends else "after", trainer.state.step))
        self.losses.append(result.mean_losses["loss"])
        saved = Path(trainer.run_dir, "checkpoints", f"step_{trainer.state.step:08d}")
        assert not saved.exists(), "what a hook does is done when the step is saved"

    def close(self) -> None:
        self.events.append(("closed", 0))


def train_and_record(config) -> Recorder:
    recorder = Recorder()
    train(config, recorder)
    return recorder


def test_a_hook_of_ones_own_is_called_around_every_step(tmp_path):
    config = run_config(tmp_path, training__train_iters=3, logging__log_interval=1)
    first, second = run_ranks(2, train_and_record, config)
    around = [event for step in range(2) for event in (("before", step), ("after", step + 1))]
    assert first.events == second.events == [*around, ("before", 2), ("after, the last", 3), ("closed", 0)]
    logged = [line["loss"] for line in metric_lines(config) if "loss" in line]
    assert first.losses == second.losses == logged


def test_the_profiler_writes_a_trace_of_the_steps_that_are_asked_for(tmp_path):
    config = run_config(tmp_path, training__train_iters=4, logging__profile_steps="[2, 3]")
    run_ranks(2, train, config)
    [path] = (tmp_path / "run" / "profile").iterdir()
    assert path.name == "steps_2_3.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert sum(event["name"] == "Optimizer.step#AdamW.step" for event in events) == 2


@pytest.mark.parametrize("steps", ["[3]", "[0, 1]", "[3, 2]"])
def test_profile_steps_are_a_first_and_a_last(tmp_path, steps):
    with pytest.raises(ConfigError, match=r"logging.profile_steps=\[.*: must be \[first, last\] with 1 <= first"):
        run_config(tmp_path, logging__profile_steps=steps)


def two_steps() -> tuple[StepResult, StepResult, int, int]:
    config = tiny_config()
    parallel.initialize(config.parallel, seed=1)
    state = build_train_state(config, fill_weights)
    votes = (1.0, float(torch.distributed.get_rank()))
    results = [train_step(state, own_share(mixed_batches(config, 0)), votes, wants) for wants in (False, True)]
    return *results, state.step, state.consumed_samples


def test_a_step_can_be_called_without_a_trainer():
    for first, second, steps, samples in run_ranks(2, two_steps):
        assert (steps, samples) == (2, 8)
        assert first.votes == [2.0, 1.0]
        assert second.mean_losses["loss"] < first.mean_losses["loss"]
        assert first.num_samples == 4 and 0 < first.num_tokens == second.num_tokens
        assert first.part_grad_norms == {}
        assert sum(norm**2 for norm in second.part_grad_norms.values()) == pytest.approx(second.grad_norm**2, rel=1e-5)


def step_with_nan() -> None:
    config = tiny_config()
    parallel.initialize(config.parallel, seed=1)
    state = build_train_state(config)
    with torch.no_grad():
        state.model_chunks[0].output_layer.weight.fill_(torch.nan)
    with pytest.raises(MostError, match="step 1: the loss is nan; nothing of this step was saved"):
        train_step(state, mixed_batches(config, 0))
    assert state.step == 0


def test_a_loss_that_is_no_number_ends_the_step_before_the_weights_move():
    run_ranks(1, step_with_nan)
