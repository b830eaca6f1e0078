"""FP8 in the whole model, emulated: what is in it, what is not, and the same in every layout."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from megatron_most import parallel
from megatron_most.config import RunConfig
from megatron_most.errors import ConfigError
from megatron_most.model import build_model, check_libraries
from megatron_most.model.fp8 import collect_fp8_padding, end_fp8_step
from megatron_most.moe import collect_routing, end_routing_step
from megatron_most.moe.experts import ExpertPool
from megatron_most.precision.linear import Fp8ColumnParallelLinear, Fp8Linear, Fp8RowParallelLinear
from megatron_most.training.optimizer import build_optimizer, wrap_model
from tests.distributed.harness import run_ranks
from tests.distributed.observe import STEADY, backward, mixed_batches
from tests.distributed.shards import fill_weights
from tests.distributed.tiny import WIDE, tiny_config

FP8 = {**WIDE, "precision__fp8": "hybrid", "precision__fp8_backend": "emulate"}


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


def test_first_and_last_layers_are_the_models_not_the_stages() -> None:
    config = fp8_config(parallel__pipeline_model_parallel_size=2, precision__bf16_first_layers=0)
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


def train(overrides: dict[str, Any], num_steps: int = 3) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step; weights and batches are the same in every layout."""
    config = fp8_config(**{**STEADY, **overrides})
    parallel.initialize(config.parallel, seed=1)
    chunks = build_model(config)
    fill_weights(chunks)
    wrapped = wrap_model(config, chunks)
    optimizer = build_optimizer(config, wrapped)
    found = []
    for step in range(num_steps):
        table = backward(config, wrapped, optimizer, mixed_batches(config, step))
        _, norm, _ = optimizer.step()
        end_routing_step(chunks)
        end_fp8_step(chunks)
        found.append((table[0][0] / table[0][1], float(norm)))
    return found


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


def first_routing(overrides: dict[str, Any]) -> list[Any]:
    config = fp8_config(**overrides)
    parallel.initialize(config.parallel, seed=1)
    chunks = build_model(config)
    fill_weights(chunks)
    wrapped = wrap_model(config, chunks)
    backward(config, wrapped, build_optimizer(config, wrapped), mixed_batches(config, 0))
    return [collect_routing(chunks, config.model), collect_fp8_padding(chunks)]


def test_a_router_that_sees_the_same_input_routes_the_same() -> None:
    """Experts of the first MoE layer are in FP8, the layers before it are not: its routing is that without FP8."""
    dense = {"model__num_dense_layers": 1, "precision__bf16_first_layers": 1}
    ((with_fp8, padding),) = run_ranks(1, first_routing, {**dense, "precision__bf16_last_layers": 0})
    ((without, none),) = run_ranks(1, first_routing, {**dense, "precision__fp8": "off"})
    # Layer 2 is the first in FP8: its attention differs a little, the scores of its router with it.
    for name in ("text", "audio"):
        moved = sum(abs(a - b) for a, b in zip(with_fp8[0]["pairs"][name], without[0]["pairs"][name], strict=True))
        assert moved <= 0.1 * sum(without[0]["pairs"][name])
    assert with_fp8[0]["outside_group"] == 0
    assert 0 < padding < 1 and none is None


def test_experts_kept_in_bf16_are_those_without_fp8() -> None:
    """With attention and shared experts out of the way, a pool that is kept computes bit for bit what it did."""
    generator = torch.Generator().manual_seed(0)
    tokens, probs = torch.randn(40, 64, generator=generator), torch.rand(40, generator=generator)
    kept, plain, quantised = (
        run_ranks(1, pool_output, fp8_config(**overrides), tokens, probs)[0]
        for overrides in ({"precision__bf16_expert_pools": "[audio]"}, {"precision__fp8": "off"}, {})
    )
    assert torch.equal(kept["audio"], plain["audio"]) and not torch.equal(quantised["audio"], plain["audio"])
    assert torch.equal(kept["text"], quantised["text"]) and not torch.equal(kept["text"], plain["text"])


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
        ({"precision__fp8_recipe": "mxfp8"}, "precision.fp8='hybrid': mxfp8"),
        ({"precision__bf16_expert_pools": "[sound]"}, "bf16_expert_pools='sound': must be one of text, audio"),
        ({"precision__bf16_first_layers": 3}, "leaves none of 4 layers"),
        ({"model__moe__ffn_hidden_size": 72}, "ffn_hidden_size=72: each rank's share, 72, must be divisible by 16"),
        ({"model__attention__kv_lora_rank": 24}, "kv_lora_rank=24: each rank's share, 24"),
        ({"data__seq_length": 28}, "data.seq_length=28: gives 56 positions"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_built(overrides: dict[str, Any], match: str) -> None:
    dtype = {"precision__dtype": "bf16"} if overrides.get("precision__fp8_backend") == "auto" else {}
    with pytest.raises(ConfigError, match=match):
        check_libraries(fp8_config(**{**overrides, **dtype}))
