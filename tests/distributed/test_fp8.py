"""FP8 in the whole model, emulated: what is in it, what is not, and the same in every layout."""

from __future__ import annotations

import functools
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from megatron_most import parallel
from megatron_most.checkpointing import load_checkpoint, save_checkpoint
from megatron_most.config import RunConfig
from megatron_most.errors import ConfigError
from megatron_most.model import build_model, check_libraries
from megatron_most.model.fp8 import collect_fp8_padding, fp8_state
from megatron_most.moe import collect_routing
from megatron_most.moe.experts import ExpertPool
from megatron_most.precision.linear import Fp8ColumnParallelLinear, Fp8Linear, Fp8RowParallelLinear
from megatron_most.training.train_step import build_train_state, compute_gradients, train_step
from tests.distributed.harness import run_ranks
from tests.distributed.observe import STEADY, mixed_batches, own_share
from tests.distributed.shards import Piece, assemble, fill_weights, pieces_of
from tests.distributed.tiny import FP8, tiny_config
from tests.unit.checkpointing.test_metadata import metadata_of
from tests.unit.moe.routing import make_tokens, route


def fp8_config(**overrides: Any) -> RunConfig:
    return tiny_config(**{**FP8, **overrides})


def names_in_fp8(config: RunConfig) -> set[str]:
    parallel.initialize(config.parallel, config.seed)
    chunk = build_model(config)[0]
    classes = (Fp8ColumnParallelLinear, Fp8RowParallelLinear, Fp8Linear)
    found = {name for name, module in chunk.named_modules() if isinstance(module, classes)}
    return found | {
        name for name, module in chunk.named_modules() if isinstance(module, ExpertPool) and all(module.fp8.values())
    }


def test_the_layers_in_between_compute_in_fp8_and_nothing_else_does() -> None:
    (found,) = run_ranks(1, names_in_fp8, fp8_config(precision__bf16_expert_pools="[audio]"))
    attention = [
        "self_attention.linear_q_proj",
        "self_attention.linear_kv_down_proj",
        "self_attention.linear_kv_up_proj",
        "self_attention.linear_proj",
    ]
    experts = ["mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2", "mlp.experts.text_experts"]
    assert found == {f"decoder.layers.{layer}.{name}" for layer in (1, 2) for name in attention + experts}


def added_by_biases(config: RunConfig) -> torch.Tensor:
    parallel.initialize(config.parallel, config.seed)
    linear = build_model(config)[0].decoder.layers[1].self_attention.linear_qkv
    rows = torch.randn(32, 1, config.model.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = linear(rows)[0]
        linear.bias.fill_(3.0)
        return linear(rows)[0] - before


def test_biases_are_added_to_fp8_products() -> None:
    gqa = {
        "model__attention__type": "gqa",
        "model__attention__num_query_groups": 2,
        "model__attention__kv_channels": 16,
    }
    (added,) = run_ranks(1, added_by_biases, fp8_config(**gqa, model__attention__add_qkv_bias=True))
    torch.testing.assert_close(added, torch.full_like(added, 3.0))


def test_first_and_last_layers_are_the_models_not_the_stages() -> None:
    config = fp8_config(parallel__pipeline_model_parallel_size=2, precision__num_layers_at_start_in_bf16=0)
    first, last = run_ranks(2, names_in_fp8, config)
    assert {name.split(".")[2] for name in first} == {"0", "1"}
    assert {name.split(".")[2] for name in last} == {"0"}  # a stage counts its own layers


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ep2": (2, {"parallel__expert_model_parallel_size": 2}),
    "pp2": (2, {"parallel__pipeline_model_parallel_size": 2}),
    "tp2": (2, {"parallel__tensor_model_parallel_size": 2}),
    "dp2": (2, {}),
    "recompute": (1, {"training__recompute": "full"}),
    "sequential": (1, {"model__moe__expert_backend": "sequential"}),
}


def train(overrides: dict[str, Any], num_steps: int = 3, num_batches: int = 3) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step; weights and batches are the same in every layout."""
    config = fp8_config(**{**STEADY, "optimizer__lr_decay_style": "constant", **overrides})
    parallel.initialize(config.parallel, seed=1)
    state = build_train_state(config, fill_weights)
    results = [train_step(state, own_share(mixed_batches(config, step % num_batches))) for step in range(num_steps)]
    return [(result.mean_losses["loss"], result.grad_norm) for result in results]


SAVED = {
    "precision__fp8_recipe": "delayed",
    "precision__fp8_amax_history_len": 2,
    "optimizer__overlap_grad_reduce": False,
}
READERS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2, sequential": (2, {"parallel__tensor_model_parallel_size": 2, "model__moe__expert_backend": "sequential"}),
    "pp2, ep2": (4, {"parallel__pipeline_model_parallel_size": 2, "parallel__expert_model_parallel_size": 2}),
}


def histories(overrides: dict[str, Any], run_dir: Path, num_steps: int) -> list[Piece]:
    """This rank's pieces after some steps, which are saved; after none, of what was saved before."""
    config = fp8_config(**{**STEADY, **SAVED, **overrides})
    parallel.initialize(config.parallel, seed=1)
    state = build_train_state(config, fill_weights)
    for step in range(num_steps):
        train_step(state, own_share(mixed_batches(config, step)))
    if num_steps:
        metadata = metadata_of(config, step=num_steps)
        save_checkpoint(run_dir, metadata, state.model_chunks, state.optimizer, keep_last=1)
    else:
        load_checkpoint(run_dir, config, state.model_chunks, state.optimizer)
    return list(pieces_of({"fp8": fp8_state(state.model_chunks)}))


def test_histories_go_through_a_checkpoint_into_other_layouts(tmp_path: Path) -> None:
    """Three steps of which two are kept, so that the order matters."""
    written = assemble(run_ranks(2, histories, {"parallel__expert_model_parallel_size": 2}, tmp_path, 3))
    experts = {f"fp8.layers.{layer}.mlp.experts.linear_fc1.{expert}" for layer in (1, 2) for expert in range(8)}
    assert experts < written.keys()
    assert all(past.shape == (2, 3) for past in written.values())
    assert len({tuple(past.flatten().tolist()) for past in written.values()}) == len(written)  # none may be another's
    assert all(not torch.equal(*past) for past in written.values())  # nor the older step the newer
    for name, (world_size, overrides) in READERS.items():
        read = assemble(run_ranks(world_size, histories, overrides, tmp_path, 0))
        assert read.keys() == written.keys(), name
        for key, past in written.items():
            assert torch.equal(read[key], past), f"{name}: {key}"


RUNS_WITH_OTHER_HISTORIES = [
    {"precision__fp8_recipe": "tensorwise"},
    {"precision__fp8": "off"},
    {"precision__fp8_amax_history_len": 3},
]


@pytest.mark.parametrize("saved", RUNS_WITH_OTHER_HISTORIES)
def test_histories_that_a_checkpoint_does_not_have_start_empty(saved: dict[str, Any], tmp_path: Path) -> None:
    run_ranks(1, histories, saved, tmp_path, 1)
    read = assemble(run_ranks(2, histories, {"parallel__expert_model_parallel_size": 2}, tmp_path, 0))
    assert read and all(past.shape == (2, 3) and not past.any() for past in read.values())


@functools.cache
def one_process(recipe: str, fp8: str = "hybrid") -> list[tuple[float, float]]:
    return run_ranks(1, train, {"precision__fp8_recipe": recipe, "precision__fp8": fp8})[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recipe", ["delayed", "blockwise"])
def test_layout_computes_what_one_process_does(recipe: str, layout: str) -> None:
    """But for numbers that fall to the other side of a rounding.

    A rank that holds a share of a matrix scales that share, and experts scale the tokens of all ranks together: where
    scales are those of whole tensors, these layouts round other numbers.
    """
    ranks, overrides = LAYOUTS[layout]
    tolerance = 1e-2 if layout in ("tp2", "ep2") else 2e-3
    found = run_ranks(ranks, train, {"precision__fp8_recipe": recipe, **overrides})[-1]
    for (loss, norm), (expected_loss, expected_norm) in zip(found, one_process(recipe), strict=True):
        assert loss == pytest.approx(expected_loss, rel=tolerance)
        assert norm == pytest.approx(expected_norm, rel=10 * tolerance)


@pytest.mark.parametrize(
    ("recipe", "fp8"), [("tensorwise", "hybrid"), ("delayed", "hybrid"), ("blockwise", "hybrid"), ("mxfp8", "e4m3")]
)
def test_losses_stay_near_those_without_fp8(recipe: str, fp8: str) -> None:
    """And they are not the same: FP8 is really there."""
    without = one_process("tensorwise", "off")
    for (loss, _), (expected, _) in zip(one_process(recipe, fp8), without, strict=True):
        assert loss == pytest.approx(expected, rel=0.02)
        assert loss != expected


def losses_of_100_steps(recipe: str, fp8: str) -> list[float]:
    """Four batches learned by heart, in bf16."""
    overrides = {"precision__fp8_recipe": recipe, "precision__fp8": fp8, "precision__dtype": "bf16"}
    return [loss for loss, _ in run_ranks(1, train, overrides, 100, 4)[0]]


@functools.cache
def losses_in_bf16() -> list[float]:
    return losses_of_100_steps("tensorwise", "off")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "fp8"),
    [
        ("tensorwise", "hybrid"),
        ("tensorwise", "e4m3"),
        ("delayed", "hybrid"),
        ("blockwise", "hybrid"),
        ("mxfp8", "e4m3"),
    ],
)
def test_a_hundred_steps_stay_in_a_band_around_bf16(recipe: str, fp8: str) -> None:
    """docs/fp8.md states the band: the mean loss of all steps within 5 %, and all is learned in the end."""
    found, plain = losses_of_100_steps(recipe, fp8), losses_in_bf16()
    assert fmean(found) == pytest.approx(fmean(plain), rel=0.05)
    assert fmean(found[-20:]) < 0.05 * found[0] and fmean(plain[-20:]) < 0.05 * plain[0]


def first_routing(overrides: dict[str, Any]) -> list[Any]:
    config = fp8_config(**overrides)
    parallel.initialize(config.parallel, seed=1)
    state = build_train_state(config, fill_weights)
    compute_gradients(state, own_share(mixed_batches(config, 0)))
    return [collect_routing(state.model_chunks, config.model), collect_fp8_padding(state.model_chunks)]


def test_routing_before_the_first_layer_in_fp8_is_untouched_and_after_it_moves_little() -> None:
    last = {"precision__num_layers_at_start_in_bf16": 2, "precision__num_layers_at_end_in_bf16": 0}
    ((with_fp8, (padded, rows)),) = run_ranks(1, first_routing, last)
    ((without, none),) = run_ranks(1, first_routing, {**last, "precision__fp8": "off"})
    assert len(with_fp8) == 3  # MoE layers 2 to 4, of which 3 and 4 are in FP8
    assert with_fp8[0] == without[0] and with_fp8[2] != without[2]
    for layer, plain in zip(with_fp8, without, strict=True):
        assert layer["outside_group"] == 0
        for name in ("text", "audio"):
            moved = sum(abs(a - b) for a, b in zip(layer["pairs"][name], plain["pairs"][name], strict=True))
            assert moved <= 0.1 * sum(plain["pairs"][name])
    assert 0 < padded < rows and none == (0, 0)


def routed(overrides: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    config = fp8_config(**overrides, precision__dtype="bf16")
    parallel.initialize(config.parallel, seed=1)
    chunks = build_model(config)
    fill_weights(chunks)
    hidden, modality, is_padding = make_tokens(hidden_size=config.model.hidden_size)
    return route(chunks[0].decoder.layers[2].mlp.router, hidden.bfloat16(), modality, is_padding)


def test_a_router_in_fp32_routes_the_same_input_the_same() -> None:
    """Of a layer whose attention and experts are in FP8."""
    ((probs, routing_map),) = run_ranks(1, routed, {})
    ((plain_probs, plain_map),) = run_ranks(1, routed, {"precision__fp8": "off"})
    assert probs.dtype == torch.float32 and probs.any()
    assert torch.equal(probs, plain_probs) and torch.equal(routing_map, plain_map)


def test_experts_kept_in_bf16_are_those_without_fp8() -> None:
    """With attention and shared experts out of the way, a pool that is kept computes bit for bit what it did."""
    generator = torch.Generator().manual_seed(0)
    tokens, probs = torch.randn(40, 64, generator=generator), torch.rand(40, generator=generator)
    kept, plain, quantized = (
        run_ranks(1, pool_output, fp8_config(**overrides), tokens, probs)[0]
        for overrides in ({"precision__bf16_expert_pools": "[audio]"}, {"precision__fp8": "off"}, {})
    )
    assert torch.equal(kept["audio"], plain["audio"]) and not torch.equal(quantized["audio"], plain["audio"])
    assert torch.equal(kept["text"], quantized["text"]) and not torch.equal(kept["text"], plain["text"])


def pool_output(config: RunConfig, tokens: torch.Tensor, probs: torch.Tensor) -> dict[str, torch.Tensor]:
    parallel.initialize(config.parallel, seed=1)
    chunks = build_model(config)
    fill_weights(chunks)
    experts = chunks[0].decoder.layers[1].mlp.experts
    counts = [7, 3, 10, 0]
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    with torch.no_grad():
        return {
            name: getattr(experts, f"{name}_experts")(tokens[:20], ends, probs[:20], counts)
            for name in ("text", "audio")
        }


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ({"precision__fp8_backend": "auto"}, "needs a GPU with FP8 .* fp8_backend=emulate computes"),
        ({"precision__fp8_backend": "torch", "precision__dtype": "bf16"}, "needs a GPU with FP8"),
        ({"precision__fp8_recipe": "mxfp8"}, "precision.fp8='hybrid': must be e4m3 with fp8_recipe=mxfp8"),
        ({"precision__bf16_expert_pools": "[sound]"}, "bf16_expert_pools='sound': must be one of text, audio"),
        ({"precision__num_layers_at_start_in_bf16": 3}, "leaves none of 4 layers"),
        (
            {"model__moe__moe_ffn_hidden_size": 72},
            "moe_ffn_hidden_size=72: each rank's share, 72, must be divisible by 16",
        ),
        ({"model__attention__kv_lora_rank": 24}, "kv_lora_rank=24: each rank's share, 24"),
        ({"data__seq_length": 28}, "data.seq_length=28: gives 56 positions"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_built(overrides: dict[str, Any], match: str) -> None:
    dtype = {"precision__dtype": "bf16"} if overrides.get("precision__fp8_backend") == "auto" else {}
    with pytest.raises(ConfigError, match=match):
        check_libraries(fp8_config(**{**overrides, **dtype}))
