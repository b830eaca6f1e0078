"""Quantization of each recipe against the formats' definitions, number by number in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_most.config import PrecisionConfig
from megatron_most.precision import Fp8Product

FORMATS = {"e4m3": (4, 3, 7, 448.0), "e5m2": (5, 2, 15, 57344.0)}
"""Bits of exponent and mantissa, bias, largest value (arXiv 2209.05433, table 1)."""


def nearest(value: float, name: str) -> float:
    """The FP8 number nearest to ``value``, halves to even, saturated; from the definition of the format."""
    _, mantissa_bits, bias, largest = FORMATS[name]
    if value == 0:
        return 0.0
    magnitude = min(abs(value), largest)
    exponent = max(math.floor(math.log2(magnitude)), 1 - bias)  # below: subnormal, on the grid of the smallest
    step = 2.0 ** (exponent - mantissa_bits)
    return math.copysign(min(round(magnitude / step) * step, largest), value)  # round() takes halves to even


def fp32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def one_scale(values: list[float], name: str) -> float:
    amax = max(map(abs, values))
    return fp32(FORMATS[name][3] / amax) if amax else 1.0


def power_of_two(values: list[float], name: str) -> float:
    return 2.0 ** math.floor(math.log2(one_scale(values, name)))


def e8m0(values: list[float], name: str) -> float:
    amax = max(map(abs, values))
    return 2.0 ** -max(-127, math.ceil(math.log2(fp32(amax / FORMATS[name][3])))) if amax else 2.0**127


def expected(rows: list[list[float]], recipe: str, role: str, name: str) -> list[list[float]]:
    """``rows`` after FP8, block by block."""
    height, width = len(rows), len(rows[0])
    if recipe in ("tensorwise", "delayed"):
        block, scale_of = (height, width), one_scale
    elif recipe == "mxfp8":
        block, scale_of = (1, 32), e8m0
    else:
        block, scale_of = (128, 128) if role == "weight" else (1, 128), power_of_two
    found = [row[:] for row in rows]
    for top in range(0, height, block[0]):
        for left in range(0, width, block[1]):
            places = [
                (r, c)
                for r in range(top, min(top + block[0], height))
                for c in range(left, min(left + block[1], width))
            ]
            scale = scale_of([rows[r][c] for r, c in places], name)
            for r, c in places:
                found[r][c] = fp32(nearest(fp32(rows[r][c] * scale), name) / scale)
    return found


def values(*shape: int) -> torch.Tensor:
    """Magnitudes over many powers of two, a block of zeros, ties and exact powers among them."""
    generator = torch.Generator().manual_seed(3)
    found = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-12, 6, shape, generator=generator)
    found[0, :64] = 0
    found[1, :8] = torch.tensor([1.0, 2.0, 448.0, 1.0625, 1.1875, -0.5, 2.0**-10, -(2.0**-9)])
    return found


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise", "mxfp8"])
@pytest.mark.parametrize("role", ["input", "weight", "gradient"])
@pytest.mark.parametrize("fp8", ["e4m3", "hybrid"])
def test_values_are_those_of_the_definition(recipe: str, role: str, fp8: str) -> None:
    if recipe == "mxfp8" and fp8 == "hybrid":
        pytest.skip("mxfp8 is e4m3 alone")
    precision = PrecisionConfig(fp8=fp8, fp8_recipe=recipe, fp8_backend="emulate")
    tensor = values(140, 160)  # neither side is whole blocks of 128
    name = "e5m2" if role == "gradient" and fp8 == "hybrid" else "e4m3"
    found = Fp8Product(precision).quantized(tensor, role)
    wanted = torch.tensor(expected(tensor.tolist(), recipe, role, name))
    assert torch.equal(found, wanted)
    assert not torch.equal(found, tensor)


def test_what_is_beyond_an_old_scale_saturates_and_the_largest_of_the_history_counts() -> None:
    precision = PrecisionConfig(fp8="e4m3", fp8_recipe="delayed", fp8_backend="emulate", fp8_amax_history_len=2)
    product = Fp8Product(precision)

    def step(size: float) -> float:
        found = product.quantized(torch.tensor([[size, 0.0]]), "input")[0, 0].item()
        product.history.advance(product.history.current.clone())
        return found

    assert step(1.0) == 1.0  # nothing known: the current value
    assert step(8.0) == 1.0  # the scale of 1 saturates
    assert step(8.0) == 8.0
    assert step(1.0) == 1.0  # 8 still counts: two steps
    product.quantized(torch.tensor([[1.0, 0.0]]), "input")
    assert step(2.0) == 2.0
    assert step(16.0) == pytest.approx(2.0)  # 1 and 2 are what is left


def test_a_scale_does_not_move_inside_a_step() -> None:
    product = Fp8Product(PrecisionConfig(fp8="e4m3", fp8_recipe="delayed", fp8_backend="emulate"))
    product.quantized(torch.tensor([[1.0]]), "input")
    product.history.advance(product.history.current.clone())
    first = product.quantized(torch.tensor([[0.3]]), "input")
    product.quantized(torch.tensor([[100.0]]), "input")
    assert torch.equal(product.quantized(torch.tensor([[0.3]]), "input"), first)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_nothing_and_infinity(recipe: str) -> None:
    product = Fp8Product(PrecisionConfig(fp8="e4m3", fp8_recipe=recipe, fp8_backend="emulate"))
    assert torch.equal(product.quantized(torch.zeros(2, 32), "input"), torch.zeros(2, 32))
    assert product.quantized(torch.zeros(0, 32), "input").shape == (0, 32)
