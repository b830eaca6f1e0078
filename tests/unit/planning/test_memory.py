"""Bytes of weights, gradients, optimizer state, activations and buffers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from megatron_most import parallel
from megatron_most.config import RunConfig
from megatron_most.data.loading.batch import Batch
from megatron_most.model import build_model, count_parameters
from megatron_most.moe import experts as experts_module
from megatron_most.planning import MemoryEstimate, assumed_contents, memory_of_rank, memory_per_rank, shard_sizes
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
    by_adam = sum(sizes[part] for part in ("norms", "embeddings", "embeddings.audio", "heads", "heads.audio"))
    assert only_rank(config).optimizer == 8 * by_adam + 4 * (sum(sizes.values()) - by_adam)


def test_frozen_parts_have_weights_alone() -> None:
    config = tiny_config(optimizer__lr_scales="[{part: experts.text, scale: 0}, {part: embeddings, scale: 0}]")
    sizes = shard_sizes(config, 0, 0)
    learning = sum(sizes.values()) - sizes["experts.text"] - sizes["embeddings"] - sizes["embeddings.audio"]
    estimate = only_rank(config)
    assert (estimate.weights, estimate.gradients) == (4 * sum(sizes.values()), 4 * learning)
    assert estimate.optimizer == 8 * learning


def test_frozen_rows_of_a_table_that_learns_take_memory() -> None:
    """Text rows are frozen, audio rows are not; codebooks are frozen of the heads alone."""
    config = tiny_config(
        optimizer__lr_scales="[{part: embeddings, scale: 0}, {part: embeddings.audio, scale: 1},"
        " {part: heads.audio, scale: 0}]"
    )
    codebooks = 2 * 128 * 32
    assert only_rank(config).optimizer == 8 * (sum(shard_sizes(config, 0, 0).values()) - codebooks)


def test_the_load_of_expert_ranks_is_that_of_the_mix() -> None:
    """Contiguous order: the busiest rank has 2 max(p, 1 - p) of the mean; interleaved order: every rank the mean."""
    mixed = {EP: 4, "data__audio_share": 0.8}
    rows = assumed_contents(tiny_config(**mixed))
    assert expert_load(tiny_config(**mixed), rows) == pytest.approx([1.0] * 4)
    contiguous = tiny_config(**mixed, model__moe__expert_order="contiguous")
    assert expert_load(contiguous, rows) == pytest.approx([0.4, 0.4, 1.6, 1.6])
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
    "recompute moe_act": {"training__recompute": "moe_act"},
    "recompute moe": {"training__recompute": "moe"},
    "recompute full": {"training__recompute": "full"},
}
WIDE = {
    "model__hidden_size": 128,
    "model__attention__num_attention_heads": 8,
    "model__moe__moe_ffn_hidden_size": 64,
    "model__moe__moe_shared_expert_intermediate_size": 128,
    "model__ffn_hidden_size": 256,
    "data__audio_share": 0.5,
}
"""Layers wide enough that little else counts."""


@pytest.fixture
def compiled_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The experts' activation keeps what it keeps on a GPU: Inductor's partitioner decides, without its compiler."""
    compiled = torch.compile(experts_module._weighted_swiglu, backend="aot_eager_decomp_partition")

    def activation(gate_and_up: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        with torch.compiler.set_stance("default"):
            return compiled(gate_and_up, probs)

    monkeypatch.setattr(experts_module, "_compiled_swiglu", activation)


@pytest.mark.parametrize("case", KEPT_CASES)
def test_activations_are_what_autograd_keeps(case: str, compiled_activation: None) -> None:
    """Within 8 % of the bytes of all tensors that the forward pass saves."""
    config = tiny_config(**{**WIDE, **KEPT_CASES[case]})
    parallel.initialize(config.parallel, seed=1)
    [model] = build_model(config)
    batch = tiny_batch(config, seed=1, audio_share=0.5)
    batch.is_padding.zero_()
    targets = batch.targets()
    positions, layers = batch.ids.numel(), config.model.num_layers
    frames = 0 if targets.code_index is None else len(targets.code_index)
    rows = dataclasses.replace(
        assumed_contents(config), targets=len(targets.index) / positions, frame_targets=frames / positions
    )
    recompute = config.training.recompute
    kept = saved_bytes(model, batch)
    # The CPU's norms keep a second copy of their input, which a GPU's fused one does not.
    kept -= (1 if recompute == "full" else 2 * layers + 1) * positions * config.model.hidden_size * 4

    expected = memory_of_rank(config, 1, 0, 0, imbalance=1.0, rows=rows).activations
    # The estimate holds what comes later than the forward pass: the layer that is computed again, and the gradient of
    # the logits.
    if recompute in ("moe", "full"):
        attention, experts = layer_activations(config, layers - 1, computed_pairs(config, 0, rows))
        expected -= experts + (attention if recompute == "full" else 0)
    expected -= (len(targets.index) * 128 + frames * 2 * 128) * 2 * 4
    assert kept == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize(("recompute", "width"), [("none", 3), ("moe_act", 2)])
def test_an_expert_keeps_its_input_and_as_many_widths(recompute: str, width: int, compiled_activation: None) -> None:
    """Exactly: gate and up, and their product unless that is recomputed; and probs."""
    config = tiny_config(**WIDE, training__recompute=recompute)
    parallel.initialize(config.parallel, seed=1)
    [model] = build_model(config)
    experts = model.decoder.layers[-1].mlp.experts
    counts, hidden, ffn = [5, 0, 11, 2, 30, 7, 1, 8], config.model.hidden_size, 64
    pairs = sum(counts)
    tokens, probs = torch.randn(pairs, hidden, requires_grad=True), torch.rand(pairs, requires_grad=True)
    kept = saved_bytes(experts, lambda: experts(tokens, torch.tensor(counts), probs))
    ends = 4 * len(counts)
    assert kept == 4 * pairs * (hidden + width * ffn + 1) + ends
    # The planner's difference between both is that of one layer.
    config_of = {mode: tiny_config(**WIDE, training__recompute=mode) for mode in ("none", "moe_act")}
    of_layer = {mode: layer_activations(one, 3, pairs)[1] for mode, one in config_of.items()}
    assert of_layer["none"] - of_layer["moe_act"] == 4 * pairs * ffn


def test_logits_are_counted_where_there_is_a_target() -> None:
    config = tiny_config()
    full, half = (
        memory_of_rank(
            config, 1, 0, 0, rows=dataclasses.replace(assumed_contents(config), targets=share, frame_targets=0)
        ).activations
        for share in (1.0, 0.5)
    )
    positions = 2 * config.data.seq_length
    assert full - half == positions / 2 * (128 * 12 + 4 * config.model.hidden_size)


def test_packed_documents_need_no_padded_batches_on_a_gpu() -> None:
    """torch's flash kernel keeps queries, keys, values and outputs of the queries' size, and the cut output."""
    packed = tiny_config(
        precision__dtype="bf16",
        data__packing=True,
        training__micro_batch_size=1,
        model__attention__v_head_dim=8,
        model__moe__moe_ffn_hidden_size=32,
    )
    attention, _ = layer_activations(packed, 0, 0.0)
    assert attention == 32 * 2 * (4 * 32 + 2 * 16 + 4 + 4 * (4 * 12 + 8))


def saved_bytes(model: torch.nn.Module, forward: Batch | Callable[[], object]) -> int:
    """Bytes of the storages that a forward pass saves for its backward, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in parameters:
            saved[address] = tensor  # kept alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        if isinstance(forward, Batch):
            batch = forward
            model(batch.ids, batch.modality, batch.is_padding, codes=batch.codes, targets=batch.targets())
        else:
            forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
