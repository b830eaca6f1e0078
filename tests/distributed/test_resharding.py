"""Training goes on from a checkpoint, in any layout, as it would have gone on without one.

Every layout reads what another has written, writes what it has read for the next one, and then trains on: its losses
are those of one process that never stopped. The optimizer's state counts: the same weights without it go elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_most import parallel
from megatron_most.checkpointing import load_checkpoint, load_model_weights, save_checkpoint
from megatron_most.config import RunConfig
from megatron_most.model import MoSTModel
from megatron_most.training.train_step import build_train_state, train_step
from tests.distributed.harness import run_ranks
from tests.distributed.observe import STEADY, assert_close, mixed_batches, own_share
from tests.distributed.shards import fill_weights
from tests.distributed.tiny import tiny_config
from tests.unit.checkpointing.test_metadata import metadata_of

TP, PP = "parallel__tensor_model_parallel_size", "parallel__pipeline_model_parallel_size"
EP, ETP = "parallel__expert_model_parallel_size", "parallel__expert_tensor_parallel_size"
CP, VPP = "parallel__context_parallel_size", "parallel__virtual_pipeline_model_parallel_size"
ORDER, BACKEND, MICRO = "model__moe__expert_order", "model__moe__expert_backend", "training__micro_batch_size"
UNSHARDED = {"optimizer__use_distributed_optimizer": False, "optimizer__overlap_grad_reduce": False}
CONTIGUOUS = {ORDER: "contiguous"}

SAVED_AFTER, STEPS = 3, 5
MODEL = {
    **STEADY,
    "model__moe__moe_router_bias_update_rate": 1e-2,
    "optimizer__lr_warmup_iters": 5,
    "training__train_iters": 20,
}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2-etp1": (2, {TP: 2, ETP: 1}),
    "pp2-vpp2": (2, {PP: 2, VPP: 2}),
    "dp2-ep2-contiguous": (4, {EP: 2, MICRO: 1, **CONTIGUOUS}),
    "one-unsharded": (1, UNSHARDED),
    "ep2": (2, {EP: 2}),
    "dp2": (2, {}),
}
"""Neighbors differ in everything: to and from expert parallelism, either optimizer, either order."""
MORE_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2-ep2-etp2": (4, {TP: 2, EP: 2}),
    "dp2-ep2-unsharded": (4, {EP: 2, MICRO: 1, **UNSHARDED}),
    "tp2": (2, {TP: 2}),
    "ep4": (4, {EP: 4, MICRO: 1}),
    "pp2": (2, {PP: 2, **UNSHARDED}),
    "ep2-contiguous-sequential": (2, {EP: 2, BACKEND: "sequential", **CONTIGUOUS}),
    "one-by-one": (1, {MICRO: 1}),
    "tp2-pp2": (4, {TP: 2, PP: 2}),
    "pp2-vpp2-ep2": (4, {PP: 2, VPP: 2, EP: 2, MICRO: 1}),
    "cp2-ep2": (4, {CP: 2, EP: 2}),
    "tp2-ep2-etp1-contiguous": (4, {TP: 2, EP: 2, ETP: 1, **CONTIGUOUS}),
    "dp2-unsharded": (2, UNSHARDED),
    "tp2-pp2-vpp2-ep2": (8, {TP: 2, PP: 2, VPP: 2, EP: 2, MICRO: 1}),
    "tp2-pp2-ep4-etp1": (8, {TP: 2, PP: 2, EP: 4, ETP: 1}),
}


class Run:
    """A model in training, without a run directory."""

    def __init__(
        self, overrides: dict[str, Any], step: int = 0, load_weights: Callable[[list[MoSTModel]], None] | None = None
    ) -> None:
        self.config: RunConfig = tiny_config(**{**MODEL, **overrides})
        parallel.initialize(self.config.parallel, seed=1)
        self.state = build_train_state(self.config, load_weights, num_updates=step)
        self.state.step = step

    def load(self, directory: Path) -> None:
        state = self.state
        assert load_checkpoint(directory, self.config, state.model_chunks, state.optimizer).step == state.step

    def losses(self, num_steps: int) -> list[list[list[float]]]:
        """Tables of sums and counts of the next steps: training and balance loss, by modality and task."""
        return [
            train_step(self.state, own_share(mixed_batches(self.config, self.state.step))).sums
            for _ in range(num_steps)
        ]

    def save(self, run_dir: Path) -> None:
        state = self.state
        metadata = metadata_of(self.config, step=state.step)
        save_checkpoint(run_dir, metadata, state.model_chunks, state.optimizer, keep_last=1)


def never_stop(run_dir: Path) -> list[list[list[float]]]:
    run = Run({}, load_weights=fill_weights)
    run.losses(SAVED_AFTER)
    run.save(run_dir)
    return run.losses(STEPS)


def pass_on(overrides: dict[str, Any], source: Path, copy: Path) -> list[list[list[float]]]:
    run = Run(overrides, SAVED_AFTER)
    run.load(source)
    run.save(copy)
    return run.losses(STEPS)


def without_optimizer_state(source: Path) -> list[list[list[float]]]:
    config = tiny_config(**MODEL)
    return Run({}, SAVED_AFTER, lambda chunks: load_model_weights(source, config, chunks)).losses(STEPS)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[list[float]]]]:
    run_dir = tmp_path_factory.mktemp("undisturbed")
    [losses] = run_ranks(1, never_stop, run_dir)
    return run_dir, losses


def assert_each_goes_on(layouts: dict[str, tuple[int, dict[str, Any]]], undisturbed: Any, directory: Path) -> None:
    source, expected = undisturbed
    # The first reads what the last has written, too.
    for turn, (name, (world_size, overrides)) in enumerate([*layouts.items(), *list(layouts.items())[:1]]):
        copy = directory / f"{turn}-{name}"
        for losses in run_ranks(world_size, pass_on, overrides, source, copy):
            assert_close(losses, expected, 1e-6, f"{name}, from {source.name}")
        source = copy


def test_losses_go_on_in_other_layouts(undisturbed: Any, tmp_path: Path) -> None:
    assert_each_goes_on(LAYOUTS, undisturbed, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_losses_go_on_in_all_layouts(undisturbed: Any, tmp_path: Path) -> None:
    assert_each_goes_on(MORE_LAYOUTS, undisturbed, tmp_path)


def test_losses_depend_on_the_state_of_the_optimizer(undisturbed: Any) -> None:
    source, expected = undisturbed
    [losses] = run_ranks(1, without_optimizer_state, source)
    assert_close(losses[0], expected[0], 1e-6, "first step, of the same weights")
    with pytest.raises(AssertionError):
        assert_close(losses[1:], expected[1:], 1e-3, "later steps")
