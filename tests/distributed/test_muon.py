"""Muon moves every matrix as a whole, in every layout; AdamW the rest; a checkpoint goes on to the bit."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_most import parallel
from megatron_most.checkpointing import read_metadata
from megatron_most.errors import CheckpointError
from megatron_most.model import build_model
from megatron_most.training.muon import StackedMuon
from megatron_most.training.optimizer import build_optimizer, wrap_model
from megatron_most.training.parts import named_parts
from tests.distributed.harness import run_ranks
from tests.distributed.observe import Observation, assert_close, assert_same, observe_each
from tests.distributed.shards import fill_weights
from tests.distributed.test_resharding import Run
from tests.distributed.tiny import WIDE, tiny_config
from tests.integration.tiny_run import assert_same_weights, metric_lines, run_config, train

pytest.importorskip("emerging_optimizers", reason="Muon's library is not installed")

TP, PP = "parallel__tensor_model_parallel_size", "parallel__pipeline_model_parallel_size"
EP, ETP = "parallel__expert_model_parallel_size", "parallel__expert_tensor_parallel_size"
CP, VPP = "parallel__context_parallel_size", "parallel__virtual_pipeline_model_parallel_size"
BACKEND, MICRO = "model__moe__expert_backend", "training__micro_batch_size"
GQA = {"model__attention__type": "gqa", "model__attention__num_query_groups": 2, "model__attention__kv_channels": 12}
ROUTERS = {"model__moe__router_weights": "per_modality"}

MUON: dict[str, Any] = {
    "optimizer__optimizer": "muon",
    "optimizer__use_distributed_optimizer": False,
    # In bf16 the iterations would turn the rounding of sums into steps.
    "optimizer__muon_fp32_matmul_prec": "highest",
    "optimizer__lr_scales": [
        {"part": "experts.audio", "scale": 0.5},
        {"part": "shared_experts", "scale": 0},
        {"part": "heads", "scale": 0},  # its table is moved nevertheless, for the rows of audio ids
        {"part": "heads.audio", "scale": 0.5},
    ],
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "sequential": (1, {BACKEND: "sequential"}),
    "ep2": (2, {EP: 2}),
    "tp2": (2, {TP: 2}),
    "tp2-etp1": (2, {TP: 2, ETP: 1}),
    "pp2-vpp2": (2, {PP: 2, VPP: 2}),
    "cp2": (2, {CP: 2}),
    "dp2": (2, {MICRO: 1}),
    "dp2-ep2": (4, {EP: 2, MICRO: 1}),
    "tp2-ep2-etp2": (4, {TP: 2, EP: 2}),
    "tp2-ep2-sequential": (4, {TP: 2, EP: 2, BACKEND: "sequential"}),
}
VARIANTS = {"latent": {}, "grouped-query": {**GQA, **ROUTERS}}


def observe_variants(overrides: dict[str, Any]) -> list[Observation]:
    return observe_each([({**MUON, **variant, **overrides}, 3) for variant in VARIANTS.values()])


@functools.cache
def one_process() -> list[Observation]:
    [observations] = run_ranks(1, observe_variants, {})
    return observations


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(layout: str) -> None:
    world_size, overrides = LAYOUTS[layout]
    ranks = run_ranks(world_size, observe_variants, overrides, timeout=240)
    for observations, expected in zip(zip(*ranks, strict=True), one_process(), strict=True):
        assert_same(observations, expected)


def groups(overrides: dict[str, Any]) -> list[tuple[str, tuple[int, ...], bool, float]]:
    """(part, shape, whether Muon moves it, highest rate) of every weight that learns."""
    config = tiny_config(**{**MUON, **overrides})
    parallel.initialize(config.parallel, seed=1)
    wrapped = wrap_model(config, build_model(config))
    optimizer = build_optimizer(config, wrapped)
    learning = [name for name, parameter, _ in named_parts(config, wrapped) if parameter.requires_grad]
    found = [
        (
            group["part"],
            tuple(weight.shape),
            isinstance(member.optimizer, StackedMuon),
            group["max_lr"] / config.optimizer.lr,
        )
        for member in optimizer.chained_optimizers
        for group in member.param_groups
        for weight in group["params"]
    ]
    assert len(found) == len(learning)
    return found


@pytest.mark.parametrize("overrides", [{}, {"precision__dtype": "bf16"}, ROUTERS], ids=["fp32", "bf16", "routers"])
def test_who_moves_what_and_how_fast(overrides: dict[str, Any]) -> None:
    [found] = run_ranks(1, groups, overrides)
    by_muon = {part for part, _, is_muon, _ in found if is_muon}
    assert by_muon == {"experts.text", "experts.audio", "routers", "dense_ffn", "attention"}
    assert {part for part, _, is_muon, _ in found if not is_muon} == {
        "norms",
        "embeddings",
        "embeddings.audio",
        "heads.audio",
    }
    assert {(part, rate) for part, *_, rate in found if rate != 1} == {("experts.audio", 0.5), ("heads.audio", 0.5)}


def updates() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Momentum and update of a pool's first projection."""
    config = tiny_config(**MUON)
    parallel.initialize(config.parallel, seed=1)
    optimizer = build_optimizer(config, wrap_model(config, build_model(config)))
    [muon, *_] = [m.optimizer for m in optimizer.chained_optimizers if isinstance(m.optimizer, StackedMuon)]
    pool = next(weight for group in muon.param_groups for weight in group["params"] if weight.ndim == 3)
    momentum = torch.randn(pool.shape, generator=torch.Generator().manual_seed(0))
    momentum[1] = 0  # an expert that no token chose
    return [(momentum, muon.orthogonalize(pool, momentum))]


def test_each_expert_is_a_matrix_of_its_own() -> None:
    """The iterations bring singular values near 1 (0.7 to 1.3); an expert without tokens stays where it is."""
    [[(momentum, update)]] = run_ranks(1, updates)
    assert not update[1].any()
    scale = max(update.shape[1:]) ** 0.5
    for matrix, moved in zip(momentum[[0, 2, 3]], update[[0, 2, 3]], strict=True):
        values = torch.linalg.svdvals(moved / scale)
        assert values.min() > 0.6 and values.max() < 1.4
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        assert torch.nn.functional.cosine_similarity((left @ right).flatten(), moved.flatten(), dim=0) > 0.95


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [(1, {}), (2, {EP: 2}), (2, {**WIDE, TP: 2, "precision__dtype": "bf16"})],
    ids=["one", "ep2", "tp2-bf16"],
)
def test_resumed_run_equals_undisturbed_run(world_size: int, overrides: dict[str, Any], tmp_path: Path) -> None:
    undisturbed = run_config(tmp_path, "undisturbed", **MUON, **overrides)
    weights = run_ranks(world_size, train, undisturbed)
    resumed = run_config(tmp_path, "resumed", **MUON, **overrides)
    shutil.copytree(undisturbed.run_dir, resumed.run_dir)
    shutil.rmtree(Path(resumed.run_dir) / "checkpoints" / "step_00000006")
    assert read_metadata(resumed.run_dir).step == 3
    assert_same_weights(weights, run_ranks(world_size, train, resumed))
    assert metric_lines(undisturbed) == metric_lines(resumed)


def never_stop(run_dir: Path) -> list[list[list[float]]]:
    run = Run(MUON, load_weights=fill_weights)
    run.losses(2)
    run.save(run_dir)
    return run.losses(3)


def pass_on(overrides: dict[str, Any], source: Path, copy: Path) -> list[list[list[float]]]:
    run = Run({**MUON, **overrides}, 2)
    run.load(source)
    run.save(copy)
    return run.losses(3)


def test_losses_go_on_in_other_layouts(tmp_path: Path) -> None:
    [expected] = run_ranks(1, never_stop, tmp_path / "source")
    source = tmp_path / "source"
    for name in ("ep2", "tp2-etp1", "pp2-vpp2", "sequential"):
        world_size, overrides = LAYOUTS[name]
        for losses in run_ranks(world_size, pass_on, overrides, source, tmp_path / name):
            assert_close(losses, expected, 1e-5, f"{name}, from {source.name}")
        source = tmp_path / name


def go_on_with_adam(source: Path) -> str:
    run = Run({}, 2)
    with pytest.raises(CheckpointError) as caught:
        run.load(source)
    return str(caught.value)


def test_another_optimizers_state_is_refused(tmp_path: Path) -> None:
    run_ranks(1, never_stop, tmp_path)
    [message] = run_ranks(1, go_on_with_adam, tmp_path)
    assert "holds the state of optimizer.optimizer='muon', not of 'adam'; choose another run_dir" in message
    assert "\n" not in message
