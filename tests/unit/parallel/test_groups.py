"""How long ranks wait for each other."""

from __future__ import annotations

import dataclasses
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_most import parallel
from megatron_most.config import ParallelConfig
from megatron_most.errors import ConfigError
from tests.distributed.harness import run_ranks


def timeouts(layout: ParallelConfig) -> set[timedelta]:
    parallel.initialize(layout, seed=1)
    groups = [
        dist.group.WORLD,
        parallel_state.get_data_parallel_group(),
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_expert_model_parallel_group(),
    ]
    return {group._get_backend(torch.device("cpu")).options._timeout for group in groups}


def test_every_group_has_the_timeout_of_the_configuration() -> None:
    layout = ParallelConfig(expert_model_parallel_size=2, distributed_timeout_minutes=2.5)
    assert run_ranks(2, timeouts, layout) == [{timedelta(seconds=150)}] * 2
    assert ParallelConfig().timeout == timedelta(seconds=600)


@pytest.mark.parametrize("minutes", [0, -1.0, 1e6, float("nan")])
def test_a_timeout_that_cannot_be_is_refused(minutes: float) -> None:
    with pytest.raises(ConfigError, match="parallel.distributed_timeout_minutes=.*: must be greater than 0, and at"):
        ParallelConfig(distributed_timeout_minutes=minutes)


def test_a_timeout_makes_no_other_layout() -> None:
    patient = dataclasses.replace(ParallelConfig(), distributed_timeout_minutes=99.0)
    assert patient.sizes == ParallelConfig().sizes
    assert set(patient.sizes) == {field.name for field in dataclasses.fields(patient)} - {"distributed_timeout_minutes"}
