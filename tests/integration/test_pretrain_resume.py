"""A run that is killed and started again ends where an undisturbed one does."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from megatron_most.checkpointing import complete_checkpoints, read_metadata
from megatron_most.checkpointing.rank_save import RankSave
from megatron_most.config import RunConfig
from megatron_most.training import optimizer as optimizer_module
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import FP8
from tests.integration.tiny_run import BeforeStep, assert_same_weights, metric_lines, run_config, train

LAYOUTS = {
    "one-rank": (1, {}),
    "expert-parallel": (2, {"parallel__expert_model_parallel_size": 2}),
    "expert-parallel-plain-optimizer": (
        2,
        {
            "parallel__expert_model_parallel_size": 2,
            "optimizer__use_distributed_optimizer": False,
            "optimizer__overlap_grad_reduce": False,
        },
    ),
    "expert-parallel-bf16": (2, {"parallel__expert_model_parallel_size": 2, "precision__dtype": "bf16"}),
    "bf16-plain-optimizer": (1, {"precision__dtype": "bf16", "optimizer__use_distributed_optimizer": False}),
    "virtual-pipeline": (
        2,
        {"parallel__pipeline_model_parallel_size": 2, "parallel__virtual_pipeline_model_parallel_size": 2},
    ),
    "fp8": (
        2,
        {
            "parallel__expert_model_parallel_size": 2,
            "precision__dtype": "bf16",
            "precision__fp8_recipe": "delayed",
            "precision__fp8_amax_history_len": 2,
            **FP8,
        },
    ),
    "tensor-parallel": (2, {"parallel__tensor_model_parallel_size": 2}),
}


def train_and_die(config: RunConfig, step: int, moment: str) -> None:
    """Train, but ``kill -9`` this rank during ``step``: before its update, or with its checkpoint half written."""

    def die(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    hooks = []
    if moment == "update":
        hooks.append(BeforeStep(step, die))
    else:
        write = RankSave.write

        def write_and_die(save: RankSave) -> object:
            written = write(save)
            return die() if save._directory.parent.name.endswith(f"{step:08d}") else written

        RankSave.write = write_and_die
    train(config, *hooks)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resumed_run_equals_undisturbed_run(layout: str, tmp_path: Path) -> None:
    world_size, overrides = LAYOUTS[layout]
    undisturbed = run_config(tmp_path, "undisturbed", **overrides)
    weights = run_ranks(world_size, train, undisturbed)

    resumed = run_config(tmp_path, "resumed", **overrides)
    shutil.copytree(undisturbed.run_dir, resumed.run_dir)
    shutil.rmtree(Path(resumed.run_dir) / "checkpoints" / "step_00000006")

    assert_same_weights(weights, run_ranks(world_size, train, resumed))
    assert metric_lines(undisturbed) == metric_lines(resumed)
    assert metric_lines(undisturbed, "routing.jsonl") == metric_lines(resumed, "routing.jsonl")


EXPERT_PARALLEL = {"parallel__expert_model_parallel_size": 2}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig, list[dict[str, torch.Tensor]]]:
    """Where a run went to its end on two ranks, its configuration, and each rank's weights."""
    directory = tmp_path_factory.mktemp("undisturbed")
    config = run_config(directory, "undisturbed", **EXPERT_PARALLEL)
    return directory, config, run_ranks(2, train, config)


@pytest.mark.parametrize(("step", "moment"), [(2, "update"), (5, "update"), (6, "save")])
def test_kill_9_and_rerun(step: int, moment: str, undisturbed: tuple) -> None:
    directory, config, weights = undisturbed
    killed = run_config(directory, f"killed-{step}-{moment}", checkpoint__async_save=False, **EXPERT_PARALLEL)
    with pytest.raises(RuntimeError, match="died without a word"):
        run_ranks(2, train_and_die, killed, step, moment)
    saved = [read_metadata(path).step for path in complete_checkpoints(killed.run_dir)[0]]
    assert saved == [at for at in (3, 6) if at < step]

    assert_same_weights(weights, run_ranks(2, train, killed))
    assert metric_lines(config) == metric_lines(killed)
    assert not list((Path(killed.run_dir) / "checkpoints").glob(".tmp-*"))


def test_sigterm_on_one_rank_saves_and_the_rerun_equals_an_undisturbed_run(undisturbed: tuple) -> None:
    directory, config, weights = undisturbed
    stopped = run_config(directory, "stopped", **EXPERT_PARALLEL)
    run_ranks(2, train_with_sigterm, stopped, 4)
    assert read_metadata(stopped.run_dir).step == 4
    assert_same_weights(weights, run_ranks(2, train, stopped))
    assert metric_lines(config) == metric_lines(stopped)


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_and_ends_the_run_in_time(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    config = run_config(
        tmp_path, parallel__distributed_timeout_minutes=0.2, training__eval_interval=0, **EXPERT_PARALLEL
    )
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 0 failed") as caught:
        run_ranks(2, train_and_freeze, config, 4)
    assert time.monotonic() - began < 40
    assert "rank 0, step 4, forward, backward and update; no progress within" in str(caught.value)
    said = capfd.readouterr().out
    assert "rank 1 does not answer (process " in said and "; rank 0: step 4, forward, backward and update at " in said
    assert "all_gather" in (Path(config.run_dir) / "stacks" / "rank-0.txt").read_text()


def train_and_freeze(config: RunConfig, step: int) -> None:
    def freeze_rank_1() -> None:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGSTOP)

    train(config, BeforeStep(step, freeze_rank_1))


def train_with_many_buckets(config: RunConfig) -> dict[str, torch.Tensor]:
    """As models of real size do: gradient buffers of several buckets, with padding between them."""
    original = optimizer_module.DistributedDataParallelConfig
    optimizer_module.DistributedDataParallelConfig = lambda **options: original(bucket_size=2000, **options)
    return train(config)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_run_equals_undisturbed_run_with_many_gradient_buckets(precision: str, tmp_path: Path) -> None:
    # A rank of 10 leaves parameters whose sizes are no multiple of Megatron's padding.
    overrides = {"precision__dtype": precision, "model__attention__kv_lora_rank": 10}
    whole = run_config(tmp_path, "whole", **overrides)
    weights = run_ranks(2, train_with_many_buckets, whole)
    resumed = run_config(tmp_path, "resumed", **overrides)
    shutil.copytree(whole.run_dir, resumed.run_dir)
    shutil.rmtree(Path(resumed.run_dir) / "checkpoints" / "step_00000006")
    assert_same_weights(weights, run_ranks(2, train_with_many_buckets, resumed))


def train_with_sigterm(config: RunConfig, step: int) -> None:
    def signal_rank_1() -> None:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)

    train(config, BeforeStep(step, signal_rank_1))


def test_finished_run_has_nothing_to_do_and_goes_on_with_more_steps(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    run_ranks(1, train, config)
    before = metric_lines(config)
    assert run_ranks(1, train, config) == [{}]
    assert metric_lines(config) == before

    longer = run_config(tmp_path, training__train_iters=8)
    assert run_ranks(1, train, longer)[0]
    assert metric_lines(longer)[: len(before)] == before
    assert metric_lines(longer)[-1]["step"] == 8
