"""How far results of a GPU may be from those of the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; 0 where both are nothing but zeros."""
    difference = (found.double() - wanted.double()).norm().item()
    return difference / wanted.double().norm().item() if difference else 0.0


def assert_near(found: dict[str, Any], wanted: dict[str, Any], logits: float, loss: float, gradients: float) -> None:
    """Two results of :func:`tests.gpu.computations.model_step` are near each other.

    Bands: ``logits`` and ``gradients`` (all together) as norms of differences over norms, ``loss`` relative.

    A single weight's gradient may be three times as far off as all together, unless it is too small to matter.
    """
    for name in ("logits", "codebook logits"):
        assert relative_error(found[name], wanted[name]) < logits, name
    (sum_found, count), (sum_wanted, count_wanted) = found["table"][0].tolist(), wanted["table"][0].tolist()
    assert count == count_wanted
    assert sum_found == pytest.approx(sum_wanted, rel=loss)
    mine, theirs = found["gradients"], wanted["gradients"]
    assert mine.keys() == theirs.keys()
    assert all(gradient.isfinite().all() for gradient in mine.values())
    together = [torch.cat([tensors[name].flatten() for name in theirs]) for tensors in (mine, theirs)]
    assert relative_error(*together) < gradients
    for name, gradient in theirs.items():
        if gradient.norm() > 1e-3 * together[1].norm():
            assert relative_error(mine[name], gradient) < 3 * gradients, name
