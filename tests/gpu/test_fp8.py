"""FP8 on a GPU: numbers are quantized as on the CPU, and torch's kernels compute the emulated products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_most import platform
from megatron_most.config import PrecisionConfig
from megatron_most.precision import Fp8Product
from megatron_most.precision.scaled_mm import ScaledMMProduct
from tests.distributed.tiny import WIDE
from tests.gpu import hardware
from tests.gpu.comparison import relative_error
from tests.gpu.computations import (
    RECIPES,
    fp8_operands,
    fp8_product,
    fp8_values,
    leave_nan_in_memory,
    losses_of_steps,
)

BAND = 6e-3
"""Norm of a difference over the norm: results are rounded to bf16, and some operands once more. 0.3 % on a CPU."""
TORCH_RECIPES = [name for name, (recipe, _) in RECIPES.items() if recipe in ("tensorwise", "delayed")]


@pytest.mark.parametrize("recipe", RECIPES)
def test_numbers_are_quantized_as_on_the_cpu(recipe: str, on_cpu: Callable[..., Any]) -> None:
    """Bit for bit: scales are quotients of fp32 numbers or powers of two, and rounding is to the nearest."""
    for role, wanted in on_cpu("fp8 values")[recipe].items():
        assert torch.equal(fp8_values(recipe)[role], wanted), role


@pytest.mark.parametrize("layer", ["linear", "experts"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_emulation_is_the_cpus(recipe: str, layer: str, on_cpu: Callable[..., Any]) -> None:
    found = fp8_product(Fp8Product, recipe, layer == "experts", torch.bfloat16)
    assert_near(found, on_cpu("fp8 products")[f"{recipe}, {layer}"])


@hardware.needs(hardware.FP8)
@pytest.mark.parametrize("layer", ["linear", "experts"])
@pytest.mark.parametrize("recipe", TORCH_RECIPES)
def test_torch_kernels_compute_the_emulated_product(recipe: str, layer: str, on_cpu: Callable[..., Any]) -> None:
    leave_nan_in_memory()
    found = fp8_product(ScaledMMProduct, recipe, layer == "experts", torch.bfloat16)
    assert_near(found, on_cpu("fp8 products")[f"{recipe}, {layer}"])


@hardware.needs(hardware.FP8)
@pytest.mark.parametrize("recipe", TORCH_RECIPES)
def test_experts_without_any_token_have_gradients_of_zeros(recipe: str) -> None:
    """As on a rank to which nobody sends anything."""
    name, fp8 = RECIPES[recipe]
    product, device = ScaledMMProduct(PrecisionConfig(fp8=fp8, fp8_recipe=name), 2), platform.device()
    leave_nan_in_memory()
    _, ends, rows = product.padding([0, 0], device)
    x = torch.zeros(rows, 256, dtype=torch.bfloat16, device=device, requires_grad=True)
    weight = torch.ones(2, 384, 256, dtype=torch.bfloat16, device=device, requires_grad=True)
    y = product.grouped(x, weight, ends)
    y.backward(torch.zeros_like(y))
    assert y.shape == (0, 384) and x.grad.shape == (0, 256)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_the_band_tells_fp8_from_bf16(on_cpu: Callable[..., Any]) -> None:
    x, weight, _ = fp8_operands(is_grouped=False)
    assert relative_error(x @ weight.t(), on_cpu("fp8 products")["tensorwise e4m3, linear"]["output"]) > 2 * BAND


@hardware.needs(hardware.FP8)
@pytest.mark.parametrize("recipe", TORCH_RECIPES)
def test_a_model_trains_as_with_the_emulation(recipe: str) -> None:
    name, fp8 = RECIPES[recipe]
    overrides = {**WIDE, "precision__fp8": fp8, "precision__fp8_recipe": name}
    found, wanted = (
        losses_of_steps({**overrides, "precision__fp8_backend": backend}, num_steps=3)
        for backend in ("torch", "emulate")
    )
    assert found == pytest.approx(wanted, rel=5e-3)


def assert_near(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, tensor in wanted.items():
        assert found[name].isfinite().all(), name
        assert relative_error(found[name], tensor) < BAND, name
