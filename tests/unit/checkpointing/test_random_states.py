"""Random states are restored only on the kind of device that saved them."""

from __future__ import annotations

import pytest
import torch

from megatron_most import parallel
from megatron_most.checkpointing.state import _rng_state, _set_rng_state
from tests.distributed.tiny import tiny_config


@pytest.fixture(autouse=True)
def process_groups():
    parallel.initialize(tiny_config().parallel, seed=1)
    yield
    parallel.destroy()


def test_random_numbers_go_on() -> None:
    state = _rng_state().data
    expected = torch.rand(4)
    _set_rng_state(state)
    assert torch.equal(torch.rand(4), expected)


def test_states_of_a_gpu_are_left_alone_on_a_cpu() -> None:
    """Its generators differ: the tracker would accept the states and fail at the next random number."""
    state = {**_rng_state().data, "cuda": torch.zeros(16, dtype=torch.uint8)}
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)
    _set_rng_state(state)
    assert torch.equal(torch.rand(4), expected)
