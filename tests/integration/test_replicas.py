"""A bit that flips in one copy of a weight ends the run before anything is saved, and the tensor and rank are named."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_most.config import RunConfig
from megatron_most.errors import MostError
from megatron_most.training import StepHook, StepResult, Trainer
from tests.distributed.harness import run_ranks
from tests.integration.tiny_run import run_config, train

TP, EP, PP = (f"parallel__{name}_model_parallel_size" for name in ("tensor", "expert", "pipeline"))
HOST = socket.gethostname()
FLIPPED_AT = 4


class Flip(StepHook):
    """Flips a bit of the last tensor with ``tensor`` in its name, on one rank, after step ``FLIPPED_AT``."""

    def __init__(self, tensor: str, on_rank: int) -> None:
        self._tensor, self._on_rank = tensor, on_rank

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if trainer.state.step == FLIPPED_AT and dist.get_rank() == self._on_rank:
            state = trainer.state.model_chunks[-1].state_dict()
            [*_, value] = [value for name, value in state.items() if self._tensor in name and torch.is_tensor(value)]
            value.view(-1).view(torch.int32)[-1] ^= 1 << 7


def run(config: RunConfig, tensor: str, on_rank: int) -> str:
    """Train, with a flipped bit on one rank. Returns the error of this rank, or the status with which it exits."""
    try:
        train(config, Flip(tensor, on_rank))
    except MostError as error:
        return str(error)
    except SystemExit as error:
        return f"status {error.code}"
    return "finished"


CASES: dict[str, tuple[int, dict[str, Any], str, int, str]] = {
    # ranks, layout, part of the tensor's name, rank of the flip, what the error says
    "dense": (2, {}, "linear_proj", 1, f"self_attention.linear_proj.weight differs between ranks 0 ({HOST}) and 1"),
    "majority": (3, {"training__global_batch_size": 6}, "linear_proj", 2, f"linear_proj.weight on rank 2 ({HOST})"),
    "expert": (2, {}, "audio_experts.linear_fc1", 0, "decoder.layers.3.mlp.experts.audio_experts.linear_fc1 differs"),
    "expert-parallel": (
        4,
        {EP: 2},
        "audio_experts.linear_fc2",
        3,
        f"linear_fc2 differs between ranks 1 ({HOST}) and 3",
    ),
    "tensor-norm": (2, {TP: 2}, "final_layernorm", 1, "decoder.final_layernorm.weight differs between ranks 0"),
    "tensor-router": (2, {TP: 2}, "router.weight", 1, "decoder.layers.3.mlp.router.weight differs between ranks 0"),
    "tensor-latent": (2, {TP: 2}, "linear_kv_down_proj", 1, "linear_kv_down_proj.weight differs between ranks 0"),
    "bias": (2, {"model__moe__moe_router_bias_update_rate": 1e-3}, "expert_bias", 1, "expert_bias.values differs"),
    "pipeline": (
        4,
        {PP: 2},
        "layers.1.mlp.router.weight",
        3,
        "decoder.layers.3.mlp.router.weight differs between ranks 2",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_flipped_bit_is_noticed_before_the_save(case: str, tmp_path: Path) -> None:
    world_size, layout, tensor, on_rank, told = CASES[case]
    config = run_config(tmp_path, **layout, checkpoint__save_interval=2, checkpoint__async_save=False)
    error, *others = run_ranks(world_size, run, config, tensor, on_rank)
    assert error.startswith(f"step {FLIPPED_AT}: ") and told in error and "nothing of this step was saved" in error
    assert set(others) == {"status 1"}
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]


def test_copies_are_compared_every_so_many_steps(tmp_path: Path) -> None:
    """Without a save in sight; with an interval of 3, two steps later than they differ."""
    options = {"checkpoint__save_interval": 100, "optimizer__use_distributed_optimizer": False}
    options["training__check_weight_hash_across_dp_replicas_interval"] = 3
    config = run_config(tmp_path, **options, optimizer__overlap_grad_reduce=False, training__train_iters=9)
    error, other = run_ranks(2, run, config, "linear_proj", 1)
    assert re.match(r"step 6: decoder\.layers\.3\.self_attention\.linear_proj\.weight differs", error)
    assert other == "status 1"
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_what_a_rank_holds_alone_is_not_compared(tmp_path: Path) -> None:
    """Shards of two tensor-parallel ranks, and experts of two expert-parallel ranks, have no copies."""
    for name, layout, tensor in (("tp", {TP: 2}, "linear_proj"), ("ep", {EP: 2}, "text_experts.linear_fc1")):
        config = run_config(tmp_path, name, **layout, checkpoint__save_interval=2)
        assert run_ranks(2, run, config, tensor, 1) == ["finished", "finished"]
