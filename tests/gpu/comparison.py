"""How far results of a GPU may be from those of the CPU."""

from __future__ import annotations

from typing import Any

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
        assert_within(name, relative_error(found[name], wanted[name]), logits)
    (sum_found, count), (sum_wanted, count_wanted) = found["table"][0].tolist(), wanted["table"][0].tolist()
    assert count == count_wanted, f"targets: {count:.0f}, not {count_wanted:.0f}"
    assert_within("loss", abs(sum_found - sum_wanted) / abs(sum_wanted), loss)
    mine, theirs = found["gradients"], wanted["gradients"]
    assert mine.keys() == theirs.keys()
    not_finite = [name for name, gradient in mine.items() if not gradient.isfinite().all()]
    assert not not_finite, f"gradients: not finite: {', '.join(not_finite)}"
    together = [torch.cat([tensors[name].flatten() for name in theirs]) for tensors in (mine, theirs)]
    smallest = 1e-3 * together[1].norm()
    errors = {name: relative_error(mine[name], theirs[name]) for name in theirs if theirs[name].norm() > smallest}
    worst = sorted(errors, key=errors.get, reverse=True)[:3]
    listed = "; worst: " + ", ".join(f"{name} {errors[name]:.2e}" for name in worst)
    assert_within("gradients", relative_error(*together), gradients, listed)
    assert_within(f"gradient of {worst[0]}", errors[worst[0]], 3 * gradients, listed)


def assert_within(what: str, error: float, band: float, listed: str = "") -> None:
    """Say how far off ``what`` is, and how far it may be."""
    assert error < band, f"{what}: relative error {error:.2e}, at most {band:.1e}{listed}"
