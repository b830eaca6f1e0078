"""A step of training: which learning rate an update uses."""

from __future__ import annotations

import pytest

from megatron_most import parallel
from megatron_most.training.train_step import build_train_state, train_step
from tests.distributed.tiny import tiny_batch, tiny_config


@pytest.mark.parametrize("updates_before", [0, 2])
def test_update_n_uses_the_rate_at_n(updates_before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted from 1: the first update of a warm-up over four is a quarter of the way up, and changes the weights."""
    config = tiny_config(optimizer__lr=0.4, optimizer__lr_warmup_iters=4, optimizer__lr_decay_style="constant")
    parallel.initialize(config.parallel, seed=1)
    state = build_train_state(config, num_updates=updates_before)
    state.step = updates_before
    used = []
    update = state.optimizer.step

    def recorded() -> object:
        used.extend({group["lr"] for group in state.optimizer.param_groups})
        return update()

    monkeypatch.setattr(state.optimizer, "step", recorded)
    for _ in range(2):
        train_step(state, [tiny_batch(config, seed=0)])
    parallel.destroy()
    assert used == pytest.approx([0.1 * (updates_before + 1), 0.1 * (updates_before + 2)])
