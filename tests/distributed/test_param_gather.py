"""Updated weights that are gathered during the next forward pass: the same training, bit for bit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_most import parallel
from megatron_most.checkpointing import complete_checkpoints
from megatron_most.errors import ConfigError
from megatron_most.training.train_step import build_train_state, gather_weights, train_step
from tests.distributed.harness import run_ranks
from tests.distributed.observe import STEADY, mixed_batches, own_share
from tests.distributed.shards import fill_weights
from tests.distributed.tiny import tiny_config
from tests.integration.tiny_run import assert_same_weights, metric_lines, run_config, train

OVERLAP, MICRO = "optimizer__overlap_param_gather", "training__micro_batch_size"
EP, PP = "parallel__expert_model_parallel_size", "parallel__pipeline_model_parallel_size"
VPP = "parallel__virtual_pipeline_model_parallel_size"
LAYOUTS = {
    "dp2-bf16": (2, {"precision__dtype": "bf16"}),
    "dp2-flat-recompute": (2, {"vocab__layout": "flat", "training__recompute": "full"}),
    "dp2-sequential-frozen": (
        2,
        {
            "model__moe__expert_backend": "sequential",
            "optimizer__lr_scales": "[{part: experts.text, scale: 0}, {part: embeddings, scale: 0}]",
        },
    ),
}
SLOW_LAYOUTS = {
    "dp2-ep2": (4, {EP: 2, MICRO: 1}),
    "dp2-pp2-vpp2": (4, {PP: 2, VPP: 2, MICRO: 1}),
}


def spoil_stale_weights(state: Any) -> None:
    """Overwrite what this rank has not updated: a forward pass that reads it before it is gathered gives NaN."""
    for chunk in state.wrapped:
        for group in [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]:
            rank, size = (
                group.intra_distributed_optimizer_instance_rank,
                group.intra_distributed_optimizer_instance_size,
            )
            for bucket in group.buckets:
                for other, shard in enumerate(bucket.param_data.chunk(size)):
                    if other != rank:
                        shard.fill_(float("nan"))


def steps(overrides: dict[str, Any], is_overlapped: bool, num_steps: int = 3) -> tuple[list[Any], torch.Tensor, int]:
    """Sums and gradient norm of each step, this rank's weights at the end, and the number of buckets."""
    config = tiny_config(**{**STEADY, **overrides, OVERLAP: is_overlapped})
    parallel.initialize(config.parallel, seed=1)
    state = build_train_state(config, fill_weights)
    found = []
    for step in range(num_steps):
        result = train_step(state, own_share(mixed_batches(config, step)))
        found.append([*result.sums, result.grad_norm])
        if is_overlapped:
            spoil_stale_weights(state)
    gather_weights(state)
    weights = torch.cat([parameter.detach().flatten() for parameter in state.model_chunks[0].parameters()])
    return found, weights, sum(len(chunk.bucket_groups) for chunk in state.wrapped)


def check(world_size: int, overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_most.training.optimizer._bucket_size", lambda: 5_000)
    expected = run_ranks(world_size, steps, overrides, False)
    found = run_ranks(world_size, steps, overrides, True)
    assert max(buckets for _, _, buckets in found) >= 3
    for (sums, weights, _), (expected_sums, expected_weights, _) in zip(found, expected, strict=True):
        assert sums == expected_sums and torch.equal(weights, expected_weights)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_the_same_bit_for_bit(layout, monkeypatch: pytest.MonkeyPatch):
    check(*LAYOUTS[layout], monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("layout", SLOW_LAYOUTS)
def test_training_is_the_same_in_more_layouts(layout, monkeypatch: pytest.MonkeyPatch):
    check(*SLOW_LAYOUTS[layout], monkeypatch)


def gathered_in_order() -> tuple[list[str], list[str]]:
    """Warnings about buckets that are asked for early, and modules of the chunk in their order."""
    config = tiny_config(**{OVERLAP: True})
    parallel.initialize(config.parallel, seed=1)
    state = build_train_state(config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_step(state, own_share(mixed_batches(config, 0)))
    late = [str(warning.message) for warning in caught if "already been dispatched" in str(warning.message)]
    return late, [name for name, _ in state.model_chunks[0].named_children()]


def test_tables_of_codes_are_gathered_with_the_embeddings(monkeypatch: pytest.MonkeyPatch):
    """In the order of the forward pass, so that no bucket is waited for before its turn."""
    monkeypatch.setattr("megatron_most.training.optimizer._bucket_size", lambda: 20_000)
    for late, modules in run_ranks(2, gathered_in_order):
        assert late == []
        assert modules == ["embedding", "codebook_embeddings", "decoder", "output_layer", "codebook_heads"]


def test_checkpoints_and_validation_have_whole_weights(tmp_path: Path):
    """A run that is stopped and resumed, too: what a checkpoint holds has been gathered."""
    runs = {}
    for is_overlapped in (False, True):
        config = run_config(tmp_path, f"overlap {is_overlapped}", **{OVERLAP: is_overlapped})
        weights = run_ranks(2, train, config)
        runs[is_overlapped] = metric_lines(config), weights
        assert len(complete_checkpoints(config.run_dir)[0]) == 2
    assert runs[True][0] == runs[False][0]
    assert_same_weights(runs[True][1], runs[False][1])


def test_it_needs_weights_that_are_gathered_in_buckets():
    for missing in ("use_distributed_optimizer", "overlap_grad_reduce"):
        with pytest.raises(ConfigError, match="optimizer.overlap_param_gather=True: needs .*overlap_grad_reduce=true"):
            tiny_config(**{OVERLAP: True, f"optimizer__{missing}": False})
