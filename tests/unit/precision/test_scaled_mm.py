"""Products by torch's kernels: equal to the emulated ones, with operands that the kernels take."""

from __future__ import annotations

import pytest
import torch

from megatron_most import platform
from megatron_most.config import PrecisionConfig
from megatron_most.precision import Fp8Product, scaled_mm
from megatron_most.precision.scaled_mm import ScaledMMProduct
from tests.unit.precision import kernels

COUNTS = [16, 0, 48, 32]


def expert_products(product: Fp8Product) -> list[torch.Tensor]:
    """Output, input gradient and weight gradient of four experts, one of them without tokens."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(sum(COUNTS), 64, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(len(COUNTS), 96, 64, generator=generator).bfloat16().requires_grad_()
    y = product.grouped(x, weight, torch.tensor(COUNTS).cumsum(0).int())
    y.backward(torch.randn(y.shape, generator=generator).bfloat16())
    return [y.detach(), x.grad, weight.grad]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Types of the left operands that the grouped kernel was given."""
    given: list[torch.dtype] = []

    def kernel(a: torch.Tensor, *arguments, **options) -> torch.Tensor:
        given.append(a.dtype)
        return kernels.scaled_grouped_mm(a, *arguments, **options)

    monkeypatch.setattr(scaled_mm, "scaled_grouped_mm", kernel)
    monkeypatch.setattr(platform, "has_grouped_fp8", lambda: True)
    return given


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
@pytest.mark.parametrize(("fp8", "num_calls"), [("e4m3", 2), ("hybrid", 1)])
def test_experts_compute_the_emulated_product_with_operands_the_kernel_takes(
    calls: list[torch.dtype], recipe: str, fp8: str, num_calls: int
) -> None:
    """The kernel multiplies e4m3 alone: with ``hybrid`` the gradients, which are e5m2, never reach it."""
    precision = PrecisionConfig(fp8=fp8, fp8_recipe=recipe)
    found = expert_products(ScaledMMProduct(precision, len(COUNTS)))
    wanted = expert_products(Fp8Product(precision, len(COUNTS)))
    assert calls == [torch.float8_e4m3fn] * num_calls
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.float() - other.float()).norm() < 4e-3 * other.float().norm()


def test_a_gpu_without_the_grouped_kernel_computes_the_emulated_product(
    calls: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "has_grouped_fp8", lambda: False)
    precision = PrecisionConfig(fp8="e4m3")
    found = expert_products(ScaledMMProduct(precision, len(COUNTS)))
    assert not calls
    assert all(
        torch.equal(one, other)
        for one, other in zip(found, expert_products(Fp8Product(precision, len(COUNTS))), strict=True)
    )


@pytest.mark.parametrize(
    ("capability", "has_grouped"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 3), True), ((12, 0), False)]
)
def test_the_grouped_kernel_is_for_some_gpus(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], has_grouped: bool
) -> None:
    assert not platform.has_grouped_fp8()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert platform.has_grouped_fp8() is has_grouped
    assert platform.has_fp8() is (capability >= (8, 9))
