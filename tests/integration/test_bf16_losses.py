"""In bf16, where no two orders of a sum agree, a training path is right if it is nearer than another seed."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_most import parallel, platform
from megatron_most.training.train_step import build_train_state, train_step
from tests.distributed.harness import run_ranks
from tests.distributed.observe import own_share
from tests.distributed.test_packed_context import CP, PACKED, UNSHARDED, packed_rows
from tests.distributed.tiny import tiny_config
from tests.unit.model.packed_rows import document_kernel

STEPS, LAST = 50, 25
PLAIN = {**PACKED, "precision__dtype": "bf16", "optimizer__lr": 3e-3, "training__train_iters": STEPS}
CHANGED = {CP: 2, "model__moe__moe_router_fusion": True, "optimizer__overlap_param_gather": True}


def losses(overrides: dict[str, Any], seed: int) -> list[float]:
    """Of each step, over the same four batches again and again."""
    config = tiny_config(**PLAIN, **overrides)
    parallel.initialize(config.parallel, seed)
    state = build_train_state(config)
    batches = [own_share(packed_rows(config, number)) for number in range(4)]
    return [train_step(state, batches[step % 4]).mean_losses["loss"] for step in range(STEPS)]


def distance(first: list[float], second: list[float]) -> float:
    """Mean difference of the last steps."""
    return sum(abs(a - b) for a, b in zip(first[-LAST:], second[-LAST:], strict=True)) / LAST


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kernels_on_two_ranks_are_nearer_than_another_seed(monkeypatch: pytest.MonkeyPatch):
    """The router's kernel, attention by a kernel for packed rows, shares of documents, and weights gathered late."""
    [plain], [other] = (run_ranks(1, losses, UNSHARDED, seed, timeout=300) for seed in (1, 2))
    monkeypatch.setattr(platform, "document_attention", lambda head_dim, dtype: document_kernel)
    changed, same = run_ranks(2, losses, CHANGED, 1, timeout=300)
    assert changed == same
    assert plain[-1] < 0.8 * plain[0], "nothing is learned"
    assert distance(changed, plain) < distance(other, plain)
