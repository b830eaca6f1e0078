"""A step with too large a gradient changes nothing but what it consumed, in every layout and after a resumption."""

from __future__ import annotations

import itertools
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from megatron_most.checkpointing import read_metadata
from tests.distributed.harness import run_ranks
from tests.integration.tiny_run import assert_same_weights, metric_lines, run_config, train

THRESHOLD = "optimizer__grad_norm_skip_threshold"
OPTIONS = {"logging__log_interval": 1, "checkpoint__save_interval": 1, "checkpoint__keep_last": 9}
TP, PP = "parallel__tensor_model_parallel_size", "parallel__pipeline_model_parallel_size"
EP, VPP = "parallel__expert_model_parallel_size", "parallel__virtual_pipeline_model_parallel_size"
UNSHARDED = {"optimizer__use_distributed_optimizer": False, "optimizer__overlap_grad_reduce": False}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "unsharded": (1, UNSHARDED),
    "cp2": (2, {"parallel__context_parallel_size": 2}),
    "ep2": (2, {EP: 2}),
    "tp2": (2, {TP: 2}),
    "pp2-vpp2": (2, {PP: 2, VPP: 2}),
    "dp2": (2, {}),
    # The second stage has nothing to learn, so its own optimizer never looks at the threshold.
    "frozen-stage": (
        2,
        {PP: 2, "optimizer__lr_scales": [{"part": "embeddings", "scale": 1}, {"part": "rest", "scale": 0}]},
    ),
}


def lines_of(config: Any) -> list[dict[str, Any]]:
    return [line for line in metric_lines(config) if "grad_norm" in line]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float, list[dict[str, Any]]]:
    """A directory, a threshold, and the lines of a run in which it skips some steps, not all.

    All runs start from the weights of the first one's first step, whatever their layout.
    """
    directory = tmp_path_factory.mktemp("one_rank")
    first = run_config(directory, "first", **OPTIONS, training__train_iters=3)
    run_ranks(1, train, first)
    free = run_config(directory, "free", **OPTIONS, **start(directory))
    run_ranks(1, train, free)
    norms = [line["grad_norm"] for line in lines_of(free)]
    threshold = statistics.median(norms)
    config = run_config(directory, "one-rank", **OPTIONS, **start(directory), **{THRESHOLD: threshold})
    run_ranks(1, train, config)
    return directory, threshold, lines_of(config)


def start(directory: Path) -> dict[str, str]:
    return {"checkpoint__load": str(directory / "first" / "checkpoints" / "step_00000001")}


def test_only_updates_move_weights_and_schedule(one_rank: tuple) -> None:
    directory, threshold, lines = one_rank
    skipped = [line["grad_norm"] > threshold for line in lines]
    assert any(skipped) and not all(skipped)
    assert [line["skipped_steps"] for line in lines] == [sum(skipped[: step + 1]) for step in range(len(lines))]
    assert [line["consumed_samples"] for line in lines] == [4 * (step + 1) for step in range(len(lines))]
    updates = 0
    rates = {}
    for line, is_skipped in zip(lines, skipped, strict=True):
        assert line["lr"] == rates.setdefault(updates + 1, line["lr"])
        updates += not is_skipped
    assert len(set(rates.values())) == len(rates)
    states = [weights_of(directory / "one-rank", step) for step in range(1, len(lines) + 1)]
    for (before, after), is_skipped in zip(itertools.pairwise(states), skipped[1:], strict=True):
        same = all(torch.equal(value, after[name]) for name, value in before.items())
        assert same == is_skipped


def weights_of(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a checkpoint."""
    path = run_dir / f"step_{step}.pt"
    dcp_to_torch_save(run_dir / "checkpoints" / f"step_{step:08d}" / "state", path)
    state = torch.load(path, weights_only=False)
    return {name: value for name, value in state.items() if torch.is_tensor(value)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(layout: str, one_rank: tuple) -> None:
    directory, threshold, lines = one_rank
    world_size, overrides = LAYOUTS[layout]
    if layout == "frozen-stage":
        threshold = 1e-6
    config = run_config(directory, layout, **OPTIONS, **start(directory), **overrides, **{THRESHOLD: threshold})
    run_ranks(world_size, train, config)
    if layout == "frozen-stage":
        assert [line["skipped_steps"] for line in lines_of(config)] == [1, 2, 3, 4, 5, 6]
        return
    for line, expected in zip(lines_of(config), lines, strict=True):
        for name in ("step", "skipped_steps", "consumed_samples", "lr"):
            assert line[name] == expected[name], name
        for name in ("loss", "grad_norm"):
            assert line[name] == pytest.approx(expected[name], rel=1e-5), name


@pytest.mark.parametrize("distributed", [True, False])
def test_resumed_run_goes_on_with_its_updates(distributed: bool, one_rank: tuple) -> None:
    directory, threshold, _ = one_rank
    overrides = {
        **OPTIONS,
        **start(directory),
        EP: 2,
        THRESHOLD: threshold,
        "optimizer__use_distributed_optimizer": distributed,
    }
    undisturbed = run_config(directory, f"undisturbed-{distributed}", **overrides)
    weights = run_ranks(2, train, undisturbed)
    resumed = run_config(directory, f"resumed-{distributed}", **overrides)
    shutil.copytree(undisturbed.run_dir, resumed.run_dir)
    for step in (3, 4, 5, 6):
        shutil.rmtree(Path(resumed.run_dir) / "checkpoints" / f"step_{step:08d}")
    before, after = read_metadata(resumed.run_dir), read_metadata(undisturbed.run_dir)
    assert before.skipped_steps > 0
    assert after.num_updates > before.num_updates
    assert_same_weights(weights, run_ranks(2, train, resumed))
    assert metric_lines(undisturbed) == metric_lines(resumed)
