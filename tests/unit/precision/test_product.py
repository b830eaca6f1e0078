"""The three products of a layer: operands, gradients, experts, padding."""

from __future__ import annotations

import pytest
import torch

from megatron_most.config import PrecisionConfig
from megatron_most.precision import Fp8Product
from megatron_most.precision.scaled_mm import ScaledMMProduct

RECIPES = ["tensorwise", "delayed", "blockwise", "mxfp8"]


def precision(recipe: str, **options) -> PrecisionConfig:
    return PrecisionConfig(
        fp8="e4m3" if recipe == "mxfp8" else "hybrid", fp8_recipe=recipe, fp8_backend="emulate", **options
    )


def operands(tokens: int, inputs: int, outputs: int, *lead: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, inputs, generator=generator, requires_grad=True)
    weight = torch.randn(*lead, outputs, inputs, generator=generator, requires_grad=True)
    return x, weight, torch.randn(tokens, outputs, generator=generator)


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_product_is_of_quantized_operands(recipe: str) -> None:
    x, weight, gradient = operands(48, 160, 144)
    product, alone = Fp8Product(precision(recipe)), Fp8Product(precision(recipe))
    y = product.linear(x, weight)
    y.backward(gradient)

    def q(tensor: torch.Tensor, role: str) -> torch.Tensor:
        return alone.quantized(tensor.detach(), role)

    assert torch.equal(y, q(x, "input") @ q(weight, "weight").t())
    assert torch.equal(x.grad, q(gradient, "gradient") @ q(weight.t(), "weight").t())
    assert torch.equal(weight.grad, q(gradient.t(), "gradient") @ q(x.t(), "input").t())
    error = (y - x @ weight.t()).norm() / y.norm()
    assert 0.005 < error < 0.06  # 3 bits of mantissa on both sides


@pytest.mark.parametrize("recipe", RECIPES)
def test_experts_compute_what_each_would_alone(recipe: str) -> None:
    counts = [5, 0, 33, 16]
    x, weight, gradient = operands(sum(counts), 64, 96, len(counts))
    product = Fp8Product(precision(recipe), len(counts))
    places, ends, rows = product.padding(counts, x.device)
    assert rows % product.alignment == 0 and ends[-1] == rows
    padded = x.new_zeros(rows, 64).index_copy(0, places, x)
    y = product.grouped(padded, weight, ends)[places]
    y.backward(gradient)

    for index, mine in enumerate(x.detach().split(counts)):
        alone = Fp8Product(precision(recipe))
        start = sum(counts[:index])
        own, matrix = mine.clone().requires_grad_(), weight.detach()[index].clone().requires_grad_()
        wanted = alone.linear(own, matrix)
        wanted.backward(gradient[start : start + len(own)])
        assert torch.allclose(y[start : start + len(own)], wanted, rtol=0, atol=1e-5)
        assert torch.allclose(x.grad[start : start + len(own)], own.grad, rtol=0, atol=1e-5)
        assert torch.allclose(weight.grad[index], matrix.grad, rtol=0, atol=1e-4)


def test_padding_is_counted() -> None:
    product = Fp8Product(precision("tensorwise"), 3)
    places, ends, rows = product.padding([5, 0, 17], torch.device("cpu"))
    assert (ends.tolist(), rows) == ([16, 16, 48], 48)
    assert places.tolist() == [*range(5), *range(16, 33)]
    assert (product.rows, product.padded_rows) == (48, 26)


def test_frozen_weights_have_no_gradient() -> None:
    x, weight, gradient = operands(32, 32, 32)
    frozen = weight.detach()
    Fp8Product(precision("blockwise")).linear(x, frozen).backward(gradient)
    assert x.grad is not None and frozen.grad is None


@pytest.mark.skipif(
    not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_scaled_mm_v2", "CPU"),
    reason="this torch has no scaled_mm on the CPU (2.13 has)",
)
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
@pytest.mark.parametrize("fp8", ["e4m3", "hybrid"])
def test_torch_kernels_compute_the_emulated_product(recipe: str, fp8: str) -> None:
    """torch has the kernel of a plain product on the CPU, too; it rounds its result to bf16."""
    options = PrecisionConfig(fp8=fp8, fp8_recipe=recipe)
    x, weight, gradient = (tensor.detach().bfloat16() for tensor in operands(48, 160, 144))
    found, wanted = [], []
    for product, results in ((ScaledMMProduct(options), found), (Fp8Product(options), wanted)):
        mine, matrix = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = product.linear(mine, matrix)
        y.backward(gradient)
        results += [y, mine.grad, matrix.grad]
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.float() - other.float()).norm() < 4e-3 * other.float().norm()
