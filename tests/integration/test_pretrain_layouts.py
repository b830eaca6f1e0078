"""A checkpoint goes on in any parallel layout and with either optimizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from megatron_most import parallel
from megatron_most.checkpointing import load_model_weights
from megatron_most.config import RunConfig
from megatron_most.model import build_model
from tests.distributed.harness import run_ranks
from tests.integration.tiny_run import metric_lines, run_config, train

LAYOUTS = {
    "expert": (2, {"parallel__expert_model_parallel_size": 2, "model__moe__expert_backend": "sequential"}),
    "four expert ranks": (4, {"parallel__expert_model_parallel_size": 4, "model__moe__expert_order": "contiguous"}),
    "tensor": (2, {"parallel__tensor_model_parallel_size": 2}),
    "virtual pipeline": (
        2,
        {"parallel__pipeline_model_parallel_size": 2, "parallel__virtual_pipeline_model_parallel_size": 2},
    ),
    "data, plain optimizer": (2, {"optimizer__use_distributed_optimizer": False}),
    "one rank, plain optimizer": (1, {"optimizer__use_distributed_optimizer": False}),
    "one rank": (1, {}),
}


def continue_run(source: RunConfig, target: RunConfig, world_size: int) -> list[dict]:
    """Continue ``source``'s step-3 checkpoint as the run ``target``; returns the metrics of steps 4 to 6."""
    checkpoints = Path(target.run_dir) / "checkpoints"
    checkpoints.mkdir(parents=True)
    shutil.copytree(Path(source.run_dir) / "checkpoints" / "step_00000003", checkpoints / "step_00000003")
    shutil.copy(Path(source.run_dir) / "config.yaml", target.run_dir)
    run_ranks(world_size, train, target)
    return last_lines(target)


def last_lines(config: RunConfig) -> list[dict]:
    """The metrics of steps 4 to 6, without those that depend on the number of expert-parallel ranks."""
    lines = [line for line in metric_lines(config) if line["step"] > 3]
    return [{name: value for name, value in line.items() if not name.startswith("routing/ep_")} for line in lines]


@pytest.mark.parametrize("saved_in", ["one rank, plain optimizer", "expert"])
def test_training_goes_on_in_another_layout(saved_in: str, tmp_path: Path) -> None:
    world_size, overrides = LAYOUTS[saved_in]
    source = run_config(tmp_path, "source", **overrides)
    run_ranks(world_size, train, source)
    expected = last_lines(source)
    for name, (world_size, overrides) in LAYOUTS.items():
        lines = continue_run(source, run_config(tmp_path, name, **overrides), world_size)
        for got, want in zip(lines, expected, strict=True):
            assert got == pytest.approx(want, rel=2e-5), f"{name}, step {want['step']}"


def loaded_weights(path: str, config: RunConfig) -> dict[str, torch.Tensor]:
    parallel.initialize(config.parallel, seed=99)
    chunks = build_model(config)
    load_model_weights(path, config, chunks)
    return {name: value.clone() for name, value in chunks[0].state_dict().items() if torch.is_tensor(value)}


def test_weights_of_any_layout_load_into_one_process(tmp_path: Path) -> None:
    one = run_config(tmp_path, "one")
    weights = run_ranks(1, train, one)[0]
    split = run_config(
        tmp_path,
        "split",
        parallel__tensor_model_parallel_size=2,
        parallel__expert_model_parallel_size=2,
        parallel__expert_tensor_parallel_size=1,
        checkpoint__load=one.run_dir,
        optimizer__lr=1e-12,
        optimizer__weight_decay=0,
    )
    run_ranks(2, train, split)
    read_back = run_ranks(1, loaded_weights, split.run_dir, one)[0]
    assert read_back.keys() == {name.removeprefix("0.") for name in weights}
    for name, value in read_back.items():
        torch.testing.assert_close(value, weights[f"0.{name}"], rtol=0, atol=1e-9, msg=name)
