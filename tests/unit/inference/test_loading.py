"""The configuration that a checkpoint is generated with."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_most.inference.loading import config_for_generation
from megatron_most.model import check_libraries
from tests.distributed.tiny import WIDE, tiny_config

TRAINED = {
    "engine": {
        "model__transformer_impl": "transformer_engine",
        "model__moe__expert_backend": "transformer_engine",
        "precision__fp8_backend": "transformer_engine",
    },
    "auto": {},
    "many ranks": {
        "parallel__expert_model_parallel_size": 4,
        "training__recompute": "full",
        "model__moe__moe_shared_expert_overlap": "true",
    },
    "kernels": {"model__moe__moe_router_fusion": "true", "model__moe__moe_permute_fusion": "true"},
}


@pytest.mark.parametrize("name", TRAINED)
def test_what_served_training_is_left_behind(name: str) -> None:
    """FP8 and Transformer Engine above all: one position is no whole alignment, and a cache has padding."""
    fp8 = {"precision__dtype": "bf16", "precision__fp8": "hybrid"}
    trained = tiny_config(**{**WIDE, **fp8, **TRAINED[name]})
    config = config_for_generation("a checkpoint", dataclasses.asdict(trained))
    check_libraries(config)  # as on this machine, so on any
    assert (config.model.transformer_impl, config.model.moe.expert_backend) == ("portable", "grouped")
    assert config.precision.dtype == "bf16" and not config.precision.uses_fp8
    assert not config.model.moe.moe_shared_expert_overlap
    assert not config.model.moe.moe_router_fusion and not config.model.moe.moe_permute_fusion
    assert (config.vocab, config.data.seq_length) == (trained.vocab, trained.data.seq_length)
    assert config.model.attention == trained.model.attention


def test_experts_one_after_another_stay() -> None:
    trained = tiny_config(model__moe__expert_backend="sequential", precision__dtype="fp32")
    config = config_for_generation("a checkpoint", dataclasses.asdict(trained))
    assert config.model.moe.expert_backend == "sequential" and config.precision.dtype == "fp32"
