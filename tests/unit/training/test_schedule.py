"""The learning rate at each step."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from megatron_most.training.optimizer import build_scheduler
from tests.distributed.tiny import tiny_config


def rates(decay_style: str, first: int = 0) -> list[float]:
    config = tiny_config(
        training__train_iters=10,
        optimizer__lr=1.0,
        optimizer__min_lr=0.1,
        optimizer__lr_warmup_iters=2,
        optimizer__lr_decay_style=decay_style,
    )
    optimizer = SimpleNamespace(param_groups=[{"max_lr": 1.0, "min_lr": 0.1}])
    scheduler = build_scheduler(config, optimizer, first)
    found = []
    for _ in range(first, 10):
        scheduler.step(1)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_warmup_starts_above_zero_and_decay_ends_at_the_minimum() -> None:
    found = rates("cosine")
    assert found[:2] == [0.5, 1.0]
    assert found[5] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 4 / 8)))
    assert found[-1] == pytest.approx(0.1)
    assert found[1:] == sorted(found[1:], reverse=True)


@pytest.mark.parametrize(("style", "middle", "last"), [("linear", 0.55, 0.1), ("constant", 1.0, 1.0)])
def test_other_styles(style: str, middle: float, last: float) -> None:
    found = rates(style)
    assert found[5] == pytest.approx(middle)
    assert found[-1] == pytest.approx(last)


def test_resumed_schedule_goes_on_where_it_was() -> None:
    assert rates("cosine", first=4) == rates("cosine")[4:]
