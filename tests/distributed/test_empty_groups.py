"""Micro-batches, experts and ranks that get nothing: steps complete, with gradients of zero, as in one process."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

from megatron_most.config import RunConfig
from megatron_most.data.loading.batch import Batch
from tests.distributed.harness import run_ranks
from tests.distributed.observe import ROWS, Observation, assert_same, observe
from tests.distributed.shards import assemble
from tests.distributed.tiny import tiny_batch

pytestmark = pytest.mark.invariance

UNSHARDED = {"optimizer__use_distributed_optimizer": False, "optimizer__overlap_grad_reduce": False}
EP, PP = "parallel__expert_model_parallel_size", "parallel__pipeline_model_parallel_size"
DISPATCHER, ORDER, RECOMPUTE = (
    "model__moe__moe_token_dispatcher_type",
    "model__moe__expert_order",
    "training__recompute",
)
# In contiguous order whole ranks hold the experts of one modality.
CONTIGUOUS = {ORDER: "contiguous"}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ep2": (2, {EP: 2}),
    "ep2-contiguous": (2, {EP: 2, **CONTIGUOUS, RECOMPUTE: "moe"}),
    "ep2-contiguous-allgather": (2, {EP: 2, **CONTIGUOUS, DISPATCHER: "allgather"}),
    "ep2-contiguous-sequential": (2, {EP: 2, **CONTIGUOUS, "model__moe__expert_backend": "sequential"}),
    "ep4-contiguous": (4, {EP: 4, **CONTIGUOUS}),
    "ep4-contiguous-allgather": (4, {EP: 4, **CONTIGUOUS, DISPATCHER: "allgather", RECOMPUTE: "full"}),
    "dp2-ep2": (4, {EP: 2, **CONTIGUOUS}),
    "pp2": (2, {PP: 2, RECOMPUTE: "full"}),
    "pp2-ep2": (4, {PP: 2, EP: 2, **CONTIGUOUS, RECOMPUTE: "moe"}),
}


def one_modality(config: RunConfig, step: int, audio_share: float) -> list[Batch]:
    return [tiny_batch(config, seed=100 * step + row, audio_share=audio_share) for row in range(ROWS)]


def text_or_audio(config: RunConfig, step: int) -> list[Batch]:
    """Ranks that read different rows hold different modalities."""
    return [tiny_batch(config, seed=100 * step + row, audio_share=row % 2) for row in range(ROWS)]


def one_token(config: RunConfig, step: int) -> list[Batch]:
    """One row with a single token, the others with none: most experts get nothing, whatever the order."""
    batches = one_modality(config, step, audio_share=0.0)
    for row, batch in enumerate(batches):
        batch.is_padding = torch.ones_like(batch.is_padding)
        batch.is_padding[:, 0] = row > 0
        batches[row] = dataclasses.replace(batch, loss_mask=(~batch.is_padding).float())
    return batches


MIXES = {
    "text": functools.partial(one_modality, audio_share=0.0),
    "audio": functools.partial(one_modality, audio_share=1.0),
    "text-or-audio": text_or_audio,
    "one-token": one_token,
}


def observe_mixes(overrides: dict[str, Any]) -> list[Observation]:
    return [observe({"training__micro_batch_size": 1, **overrides}, 2, batches_of) for batches_of in MIXES.values()]


@functools.cache
def one_process() -> list[Observation]:
    [observations] = run_ranks(1, observe_mixes, UNSHARDED)
    return observations


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(layout):
    world_size, overrides = LAYOUTS[layout]
    ranks = run_ranks(world_size, observe_mixes, overrides, timeout=100)
    for observations, expected in zip(zip(*ranks, strict=True), one_process(), strict=True):
        assert_same(observations, expected)


def test_who_gets_nothing_has_a_gradient_of_zero():
    text, audio, _, one = (assemble([observation.gradients]) for observation in one_process())
    experts = [name for name in text if ".mlp.experts." in name]
    assert experts
    for name in experts:
        # Logical order: four text experts, then four audio experts. The layers come before the experts where they share
        # a tensor.
        axis = text[name].dim() - 3
        for gradients, idle in ((text, 1), (audio, 0)):
            halves = gradients[name].chunk(2, dim=axis)
            assert halves[1 - idle].any() and not halves[idle].any(), name
        used = one[name].movedim(axis, 0).flatten(1).any(dim=1)
        assert 0 < used.sum() < 8, name
