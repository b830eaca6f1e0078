"""Validation takes any number of micro-batches in every layout and gives the losses of one process."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_most import parallel
from megatron_most.model import build_model
from megatron_most.training.loss import LossTable
from megatron_most.training.optimizer import build_optimizer, wrap_model
from megatron_most.training.validation import validate
from tests.distributed.harness import run_ranks
from tests.distributed.shards import fill_weights
from tests.distributed.tiny import tiny_batch, tiny_config

pytestmark = pytest.mark.invariance

VIRTUAL_STAGES = {
    "parallel__pipeline_model_parallel_size": 2,
    "parallel__virtual_pipeline_model_parallel_size": 2,
}


def validation_losses(overrides: dict[str, Any], num_batches: int) -> dict[str, float]:
    config = tiny_config(**overrides)
    parallel.initialize(config.parallel, seed=1)
    chunks = build_model(config)
    fill_weights(chunks)
    wrapped = wrap_model(config, chunks)
    build_optimizer(config, wrapped)
    batches = {"heldout": [tiny_batch(config, seed) for seed in range(num_batches)]}
    return validate(wrapped, batches, LossTable(config.vocab, config.model.codebook_weights(config.vocab)))


@pytest.mark.parametrize("num_batches", [1, 3])
def test_virtual_stages_validate_a_number_that_is_no_multiple_of_the_pipeline_size(num_batches: int) -> None:
    [expected] = run_ranks(1, validation_losses, {}, num_batches)
    assert "validation/heldout/loss/codebook_0" in expected
    for losses in run_ranks(2, validation_losses, VIRTUAL_STAGES, num_batches):
        assert losses == pytest.approx(expected, rel=1e-6)
