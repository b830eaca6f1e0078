"""Transformer Engine: its FP8 products against the emulated ones, its spec against the portable one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core import fp8_utils

from megatron_most import platform
from megatron_most.model.transformer_config import transformer_config
from tests.distributed.tiny import WIDE, tiny_config
from tests.gpu import hardware
from tests.gpu.comparison import assert_near, relative_error
from tests.gpu.computations import (
    ALL_CHOSEN,
    COUNTS,
    RECIPES,
    fp8_operands,
    losses_of_steps,
    model_step,
    to_host,
)

pytestmark = hardware.needs(hardware.ENGINE)

ENGINE = {"model__transformer_impl": "transformer_engine", "model__moe__expert_backend": "transformer_engine"}
BAND = 1e-2
"""Norm of a difference over the norm; FP8 itself is 3 % off bf16."""
PACKED = {"data__packing": True, "training__micro_batch_size": 1}
MODELS = {
    "rows": {},
    "packed, heads of DeepSeek-V2-Lite": {
        **PACKED,
        "model__attention__qk_head_dim": 128,
        "model__attention__qk_pos_emb_head_dim": 64,
        "model__attention__v_head_dim": 128,
    },
    "packed, grouped queries": {
        **PACKED,
        "model__attention__type": "gqa",
        "model__attention__num_query_groups": 2,
        "model__attention__kv_channels": 64,
    },
}


def fp8_overrides(recipe: str) -> dict[str, Any]:
    name, fp8 = RECIPES[recipe]
    kept = 0 if name == "delayed" else 1  # which knows no layers in bf16
    return {
        **WIDE,
        **ENGINE,
        "precision__dtype": "bf16",
        "precision__fp8": fp8,
        "precision__fp8_recipe": name,
        "precision__num_layers_at_start_in_bf16": kept,
        "precision__num_layers_at_end_in_bf16": kept,
    }


def skip_unless_available(recipe: str) -> None:
    """Recipes have kernels of their own, for some GPUs and versions of CUDA only."""
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager as state

    name = RECIPES[recipe][0]
    checks = {"mxfp8": state.is_mxfp8_available, "blockwise": state.is_fp8_block_scaling_available}
    is_available, reason = checks.get(name, state.is_fp8_available)()
    if not is_available:
        pytest.skip(f"Transformer Engine has no {name} FP8 here: {reason}")


def engine_product(recipe: str, is_grouped: bool) -> dict[str, torch.Tensor]:
    """As :func:`tests.gpu.computations.fp8_product`, by Transformer Engine under Megatron's context."""
    import transformer_engine.pytorch as te

    device, dtype = platform.device(), torch.bfloat16
    megatron = transformer_config(tiny_config(**fp8_overrides(recipe)))
    outputs, inputs = fp8_operands(is_grouped)[1].shape[-2:]
    options = {"bias": False, "params_dtype": dtype, "device": device}
    module = (
        te.GroupedLinear(len(COUNTS), inputs, outputs, **options)
        if is_grouped
        else te.Linear(inputs, outputs, **options)
    )
    parameters = [getattr(module, f"weight{i}") for i in range(len(COUNTS))] if is_grouped else [module.weight]
    for scale in (2, 1) if RECIPES[recipe][0] == "delayed" else (1,):
        x, weight, gradient = ((tensor * scale).to(device, dtype) for tensor in fp8_operands(is_grouped))
        with torch.no_grad():
            for parameter, values in zip(parameters, weight if is_grouped else [weight], strict=True):
                parameter.copy_(values)
                parameter.grad = None
        x.requires_grad_()
        with fp8_utils.get_fp8_context(megatron):
            y = module(x, COUNTS) if is_grouped else module(x)
        y.backward(gradient)
    weight_gradients = [parameter.grad for parameter in parameters]
    return {
        "output": to_host(y),
        "input gradient": to_host(x.grad),
        "weight gradient": to_host(torch.stack(weight_gradients) if is_grouped else weight_gradients[0]),
    }


@hardware.needs(hardware.FP8)
@pytest.mark.parametrize("layer", ["linear", "experts"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_its_products_are_the_emulated_ones(recipe: str, layer: str, on_cpu: Callable[..., Any]) -> None:
    skip_unless_available(recipe)
    found = engine_product(recipe, layer == "experts")
    for name, wanted in on_cpu("fp8 products")[f"{recipe}, {layer}"].items():
        assert found[name].isfinite().all(), name
        assert relative_error(found[name], wanted) < BAND, name


@pytest.mark.parametrize("name", MODELS)
def test_its_spec_computes_the_portable_model(name: str) -> None:
    """With the same weights, in bf16 on both sides."""
    overrides = {**WIDE, **ALL_CHOSEN, **MODELS[name], "precision__dtype": "bf16"}
    assert_near(model_step({**overrides, **ENGINE}), model_step(overrides), logits=2e-2, loss=2e-3, gradients=3e-2)


def test_its_permutation_sends_no_rows_of_padding_and_of_a_smaller_top_k() -> None:
    """In the portable model; every expert of a modality is chosen, so that no rounding sends a token elsewhere."""
    groups = "[{modality: text, size: 2, moe_router_topk: 2}, {modality: audio, size: 1, moe_router_topk: 1}]"
    overrides = {
        **WIDE,
        "model__transformer_impl": "portable",
        "model__moe__groups": groups,
        "precision__dtype": "bf16",
    }
    fused = model_step({**overrides, "model__moe__moe_permute_fusion": True})
    assert_near(fused, model_step(overrides), logits=2e-2, loss=2e-3, gradients=3e-2)


@hardware.needs(hardware.FP8)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_in_fp8_trains_as_in_bf16(recipe: str) -> None:
    """Losses are near, and not the same: FP8 is really there."""
    skip_unless_available(recipe)
    found = losses_of_steps(fp8_overrides(recipe), num_steps=3)
    wanted = losses_of_steps({**WIDE, **ENGINE}, num_steps=3)
    assert found == pytest.approx(wanted, rel=0.02)
    assert found != wanted
