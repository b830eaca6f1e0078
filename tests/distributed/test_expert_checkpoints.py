"""Checkpoints hold experts by logical number: any backend, order and layout reads what any other wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_most import parallel
from megatron_most.checkpointing import load_checkpoint, save_checkpoint
from megatron_most.checkpointing.optimizer_state import OptimizerState
from megatron_most.checkpointing.state import _model_state
from megatron_most.config import RunConfig
from megatron_most.training.train_step import build_train_state, train_step
from tests.distributed.harness import run_ranks
from tests.distributed.observe import own_share
from tests.distributed.shards import Piece, assemble, fill_weights, pieces_of
from tests.distributed.tiny import tiny_batch, tiny_config
from tests.unit.checkpointing.test_metadata import metadata_of

EP, ETP = "parallel__expert_model_parallel_size", "parallel__expert_tensor_parallel_size"
TP = "parallel__tensor_model_parallel_size"
BACKEND, ORDER = "model__moe__expert_backend", "model__moe__expert_order"

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ep2 sequential interleaved": (2, {EP: 2, BACKEND: "sequential"}),
    "ep1 grouped contiguous": (1, {ORDER: "contiguous"}),
    "ep4 grouped interleaved": (4, {EP: 4}),
    "ep2 grouped contiguous, plain optimizer": (
        2,
        {EP: 2, ORDER: "contiguous", "optimizer__use_distributed_optimizer": False},
    ),
    "tp2 etp2 grouped": (2, {TP: 2}),
    "tp2 etp1 grouped, copies on both ranks": (2, {TP: 2, ETP: 1}),
    "ep2 sequential contiguous": (2, {EP: 2, BACKEND: "sequential", ORDER: "contiguous"}),
}


def config_of(layout: str) -> RunConfig:
    groups = (
        "[{modality: text, experts: [5, 0, 3, 1], moe_router_topk: 2},"
        " {modality: audio, experts: [7, 2, 4], moe_router_topk: 1}]"
    )
    moe = {"model__moe__common__experts": "[6]", "model__moe__moe_router_bias_update_rate": 1e-2}
    return tiny_config(model__moe__groups=groups, model__num_layers=2, **moe, **LAYOUTS[layout][1])


def everything(chunks: list[torch.nn.Module], optimizer: Any) -> list[Piece]:
    """This rank's pieces of the weights, expert biases among them, and of the optimizer's state."""
    state = _model_state(chunks)
    state["optimizer"] = OptimizerState(optimizer, state, loading=False).tensors
    return [(key, shape, at, piece.detach().clone()) for key, shape, at, piece in pieces_of(state)]


def step_and_save(layout: str, run_dir: Path) -> list[Piece]:
    config = config_of(layout)
    parallel.initialize(config.parallel, seed=1)
    state = build_train_state(config, fill_weights)
    train_step(state, own_share([tiny_batch(config, seed) for seed in range(4)]))
    save_checkpoint(run_dir, metadata_of(config, step=1), state.model_chunks, state.optimizer, keep_last=2)
    return everything(state.model_chunks, state.optimizer)


def load(layout: str, run_dir: Path, save_to: Path | None = None) -> list[Piece]:
    config = config_of(layout)
    parallel.initialize(config.parallel, seed=2)
    state = build_train_state(config)
    chunks, optimizer = state.model_chunks, state.optimizer
    metadata = load_checkpoint(run_dir, config, chunks, optimizer)
    if save_to is not None:
        save_checkpoint(save_to, metadata_of(config, step=metadata.step), chunks, optimizer, keep_last=2)
    return everything(chunks, optimizer)


def test_weights_and_optimizer_state_load_in_every_layout(tmp_path: Path) -> None:
    writer = "ep2 sequential interleaved"
    written = assemble(run_ranks(LAYOUTS[writer][0], step_and_save, writer, tmp_path / writer))
    assert written["decoder.layers.1.mlp.experts.experts.linear_fc1.weight"].shape == (8, 48, 32)
    bias = written["decoder.layers.1.mlp.router.expert_bias.values"]
    assert bias.shape == (2, 8) and bias.unique().numel() == bias.numel()  # no two could change places unseen
    for kind in ("exp_avg", "exp_avg_sq"):
        assert written[f"optimizer.state.{kind}.decoder.layers.1.mlp.experts.experts.linear_fc2.weight.7"].any()
    source = tmp_path / writer
    for reader, (world_size, _) in LAYOUTS.items():
        # Each writes what it has read, for the next to read.
        read = assemble(run_ranks(world_size, load, reader, source, tmp_path / reader / "copy"))
        assert_same(read, written, reader)
        source = tmp_path / reader / "copy"
    assert_same(assemble(run_ranks(LAYOUTS[writer][0], load, writer, source)), written, f"back in {writer}")


def assert_same(read: dict[str, torch.Tensor], written: dict[str, torch.Tensor], where: str) -> None:
    assert read.keys() == written.keys()
    for name, value in written.items():
        assert torch.equal(read[name], value), f"{where}: {name} differs"
