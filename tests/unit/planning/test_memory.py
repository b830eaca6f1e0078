"""Bytes of weights, gradients, optimizer state, activations and buffers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_most import parallel
from megatron_most.config import RunConfig
from megatron_most.data.loading.batch import Batch
from megatron_most.model import build_model, count_parameters
from megatron_most.planning import MemoryEstimate, memory_of_rank, memory_per_rank, shard_sizes
from megatron_most.planning.memory import computed_pairs, expert_load, layer_activations, micro_batches_under_way
from tests.distributed.tiny import tiny_batch, tiny_config

EP = "parallel__expert_model_parallel_size"
PP, VPP = "parallel__pipeline_model_parallel_size", "parallel__virtual_pipeline_model_parallel_size"


def only_rank(config: RunConfig, world_size: int = 1) -> MemoryEstimate:
    return memory_of_rank(config, world_size, 0, 0)


def test_weights_gradients_and_states_follow_from_the_counts() -> None:
    config = tiny_config()
    total = count_parameters(config)["total"]
    estimate = only_rank(config)
    assert (estimate.weights, estimate.gradients, estimate.optimizer) == (4 * total, 4 * total, 8 * total)
    bf16 = tiny_config(precision__dtype="bf16")
    estimate = only_rank(bf16)
    assert (estimate.weights, estimate.gradients, estimate.optimizer) == (2 * total, 4 * total, 12 * total)
    assert only_rank(bf16, 4).optimizer == 3 * total
    assert only_rank(tiny_config(optimizer__use_distributed_optimizer=False), 4).optimizer == 8 * total
    assert estimate.total == sum(getattr(estimate, field.name) for field in dataclasses.fields(estimate))


def test_muon_keeps_one_moment_of_what_it_moves() -> None:
    config = tiny_config(optimizer__optimizer="muon", optimizer__use_distributed_optimizer=False)
    sizes = shard_sizes(config, 0, 0)
    by_adam = sum(sizes[part] for part in ("norms", "embeddings", "heads"))
    assert only_rank(config).optimizer == 8 * by_adam + 4 * (sum(sizes.values()) - by_adam)


def test_frozen_parts_have_weights_alone() -> None:
    config = tiny_config(optimizer__lr_scales="[{part: experts.text, scale: 0}, {part: embeddings, scale: 0}]")
    sizes = shard_sizes(config, 0, 0)
    learning = sum(sizes.values()) - sizes["experts.text"] - sizes["embeddings"]
    estimate = only_rank(config)
    assert (estimate.weights, estimate.gradients) == (4 * sum(sizes.values()), 4 * learning)
    assert estimate.optimizer == 8 * learning


def test_the_load_of_expert_ranks_is_that_of_the_mix() -> None:
    """Contiguous order: the busiest rank has 2 max(p, 1 - p) of the mean; interleaved order: every rank the mean."""
    mixed = {EP: 4, "data__audio_share": 0.8}
    assert expert_load(tiny_config(**mixed)) == pytest.approx([1.0] * 4)
    contiguous = tiny_config(**mixed, model__moe__expert_order="contiguous")
    assert expert_load(contiguous) == pytest.approx([0.4, 0.4, 1.6, 1.6])
    estimates = memory_per_rank(contiguous, 4, imbalance=1.0)
    even, busy = memory_of_rank(tiny_config(**mixed), 4, 0, 0, 1.0), estimates[0, 3]
    assert busy.moe_buffers > even.moe_buffers > estimates[0, 0].moe_buffers
    assert busy.activations > even.activations
    # Two pairs of 32 wide fp32 rows for each of 64 positions: sent, received, computed, sent back.
    assert even.moe_buffers == pytest.approx(4 * 2 * 64 * 32 * 4)
    assert memory_of_rank(tiny_config(**mixed), 4, 0, 0, 2.0).moe_buffers == pytest.approx(6 * 2 * 64 * 32 * 4)


@pytest.mark.parametrize(
    ("virtual", "batch", "expected"),
    [
        (None, 64, [4, 3, 2, 1]),
        (None, 2, [2, 2, 2, 1]),
        (2, 64, [11 / 2, 9 / 2, 7 / 2, 5 / 2]),
        (2, 8, [4, 4, 3.5, 2.5]),
    ],
)
def test_earlier_stages_hold_more_micro_batches(virtual: int | None, batch: int, expected: list[float]) -> None:
    config = tiny_config(
        **{PP: 4, VPP: virtual or "null", "model__num_layers": 8},
        training__global_batch_size=batch,
        training__micro_batch_size=2 if virtual else 1,
    )
    assert [micro_batches_under_way(config, 4, stage) for stage in range(4)] == expected


KEPT_CASES = {
    "mla": {},
    "q-lora": {"model__attention__q_lora_rank": 24},
    "gqa": {
        "model__attention__type": "gqa",
        "model__attention__num_query_groups": 2,
        "model__attention__kv_channels": 12,
    },
    "no shared experts": {"model__moe__moe_shared_expert_intermediate_size": 0},
    "flat": {"vocab__layout": "flat"},
    "recompute moe": {"training__recompute": "moe"},
    "recompute full": {"training__recompute": "full"},
}


@pytest.mark.parametrize("case", KEPT_CASES)
def test_activations_are_what_autograd_keeps(case: str) -> None:
    """Within 8 % of the bytes of all tensors that the forward pass saves, layers wide enough to be all that counts."""
    config = tiny_config(
        **{
            "model__hidden_size": 128,
            "model__attention__num_attention_heads": 8,
            "model__moe__moe_ffn_hidden_size": 64,
            "model__moe__moe_shared_expert_intermediate_size": 128,
            "model__ffn_hidden_size": 256,
            "data__audio_share": 0.5,
            **KEPT_CASES[case],
        }
    )
    parallel.initialize(config.parallel, seed=1)
    [model] = build_model(config)
    batch = tiny_batch(config, seed=1, audio_share=0.5)
    batch.is_padding.zero_()
    positions, layers = batch.ids.numel(), config.model.num_layers
    recompute, has_frames = config.training.recompute, config.vocab.layout == "frame"
    kept = saved_bytes(model, batch)
    # The CPU's norms keep a second copy of their input, which a GPU's fused one does not.
    kept -= (1 if recompute == "full" else 2 * layers + 1) * positions * config.model.hidden_size * 4

    expected = memory_of_rank(config, 1, 0, 0, imbalance=1.0).activations
    # The estimate holds what comes later than the forward pass: the layer that is computed again, the gradient of the
    # logits; and codes at every position.
    if recompute != "none":
        attention, experts = layer_activations(config, layers - 1, computed_pairs(config, 0))
        expected -= experts + (attention if recompute == "full" else 0)
    expected -= positions * 128 * (3 if has_frames else 1) * 2 * 4
    if has_frames:
        expected -= int((batch.code_labels < 0).all(-1).sum()) * 2 * 128 * 4
    assert kept == pytest.approx(expected, rel=0.08)


def saved_bytes(model: torch.nn.Module, batch: Batch) -> int:
    """Bytes of the storages that a forward pass saves for its backward, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in parameters:
            saved[address] = tensor  # kept alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        model(
            batch.ids,
            batch.modality,
            batch.is_padding,
            codes=batch.codes,
            labels=batch.labels,
            code_labels=batch.code_labels,
        )
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
