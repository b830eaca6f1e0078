"""A layer is recomputed with the modalities of its own micro-batch while others are in flight.

Micro-batches are text and audio in turn. With pipeline stages the first stage has run the forward of later ones when it
comes to recompute a layer for the backward of an earlier one; a modality that is kept as state would be theirs by then.
"""

from __future__ import annotations

import functools

import pytest

from megatron_most.config import RunConfig
from megatron_most.data.loading.batch import Batch
from tests.distributed.harness import run_ranks
from tests.distributed.observe import ROWS, Observation, assert_same, observe, observe_each
from tests.distributed.tiny import tiny_batch, tiny_config

pytestmark = pytest.mark.invariance

ONE_ROW = {"training__micro_batch_size": 1}
UNSHARDED = {"optimizer__use_distributed_optimizer": False, "optimizer__overlap_grad_reduce": False}
LAYOUTS = {
    "pp2": (2, {"parallel__pipeline_model_parallel_size": 2}),
    "pp2-vpp2": (
        2,
        {"parallel__pipeline_model_parallel_size": 2, "parallel__virtual_pipeline_model_parallel_size": 2},
    ),
    "pp2-ep2-etp1-tp2": (
        4,
        {
            "parallel__pipeline_model_parallel_size": 2,
            "parallel__tensor_model_parallel_size": 2,
            "parallel__expert_model_parallel_size": 2,
            "parallel__expert_tensor_parallel_size": 1,
        },
    ),
}


def text_and_audio_in_turn(config: RunConfig, step: int) -> list[Batch]:
    return [tiny_batch(config, seed=100 * step + row, audio_share=row % 2) for row in range(ROWS)]


@functools.cache
def not_recomputed() -> Observation:
    [observation] = run_ranks(1, observe, ONE_ROW | UNSHARDED, 2, text_and_audio_in_turn)
    return observation


def test_micro_batches_are_of_one_modality_each():
    batches = text_and_audio_in_turn(tiny_config(**ONE_ROW), 0)
    assert [batch.modality.unique().tolist() for batch in batches] == [[0], [1]] * (ROWS // 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_recomputed_layers_see_their_own_micro_batch(layout):
    world_size, overrides = LAYOUTS[layout]
    runs = [(ONE_ROW | overrides | {"training__recompute": mode}, 2) for mode in ("moe_act", "moe", "full")]
    ranks = run_ranks(world_size, observe_each, runs, text_and_audio_in_turn)
    for observations in zip(*ranks, strict=True):
        assert_same(observations, not_recomputed())
