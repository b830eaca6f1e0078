"""What a comparison of a GPU with the CPU says when they differ: how far off what is, and how far it may be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.gpu.comparison import assert_near

BANDS = {"logits": 1e-2, "loss": 1e-3, "gradients": 1e-2}


def result() -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    gradients = {name: torch.randn(50, generator=random) for name in "abcdefghijklmnop"}
    logits = {name: torch.randn(4, 5, generator=random) for name in ("logits", "codebook logits")}
    return {**logits, "table": torch.tensor([[12.0, 3.0]]), "gradients": gradients}


def test_equal_results_pass() -> None:
    assert_near(result(), result(), **BANDS)


def test_logits_and_losses_say_value_and_band() -> None:
    found, wanted = result(), result()
    found["codebook logits"] = 1.05 * wanted["codebook logits"]
    with pytest.raises(AssertionError, match="^codebook logits: relative error 5.00e-02, at most 1.0e-02"):
        assert_near(found, wanted, **BANDS)
    found = result()
    found["table"][0, 0] = 12.06
    with pytest.raises(AssertionError, match="^loss: relative error 5.00e-03, at most 1.0e-03"):
        assert_near(found, wanted, **BANDS)


def test_gradients_name_the_three_worst() -> None:
    found, wanted = result(), result()
    for name, factor in (("b", 1.04), ("d", 1.05), ("e", 1.03)):
        found["gradients"][name] = factor * wanted["gradients"][name]
    listed = "worst: d 5.00e-02, b 4.00e-02, e 3.00e-02"
    with pytest.raises(AssertionError, match=rf"^gradients: relative error 1.\d\de-02, at most 1.0e-02; {listed}"):
        assert_near(found, wanted, **BANDS)
    found = result()
    found["gradients"]["d"] = 1.032 * wanted["gradients"]["d"]
    with pytest.raises(AssertionError, match="^gradient of d: relative error 3.20e-02, at most 3.0e-02; worst: d "):
        assert_near(found, wanted, **BANDS)


def test_gradients_that_are_not_finite_are_named() -> None:
    found = result()
    found["gradients"]["c"][7] = torch.nan
    with pytest.raises(AssertionError, match="^gradients: not finite: c"):
        assert_near(found, result(), **BANDS)
