"""Gradient buffers are laid out before they are made, as Megatron would have laid them out by itself."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_most import parallel
from megatron_most.model import build_model
from megatron_most.training.optimizer import wrap_model
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import tiny_config

TP, PP = "parallel__tensor_model_parallel_size", "parallel__pipeline_model_parallel_size"
EP, CP = "parallel__expert_model_parallel_size", "parallel__context_parallel_size"
VPP = "parallel__virtual_pipeline_model_parallel_size"


class Warnings(logging.Handler):
    """What Megatron's gradient buffers warn of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        logging.getLogger("megatron.core.distributed").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def wrap(overrides: dict[str, Any]) -> tuple[list[bool], list[str]]:
    """Whether each chunk's layout is the one that its own wrapper would make, and what was warned of."""
    config = tiny_config(**overrides)
    parallel.initialize(config.parallel, seed=1)
    warnings = Warnings()
    wrapped = wrap_model(config, build_model(config))
    same = []
    for chunk in wrapped:
        expected = DistributedOptimizer.compute_full_param_layout(
            chunk.params_with_grad,
            chunk.bucket_size,
            chunk.intra_dp_cp_group.size(),
            chunk.ddp_config,
            expert_data_parallel_world_size=chunk.intra_expt_dp_group.size(),
        )
        same.append(chunk.full_param_layout == expected)
    return same, warnings.messages


@pytest.mark.parametrize(
    "world_size, overrides",
    [
        (1, {"optimizer__overlap_grad_reduce": False}),
        (2, {PP: 2, VPP: 2}),
        (4, {EP: 2, "training__micro_batch_size": 1, "optimizer__lr_scales": [{"part": "attention", "scale": 0}]}),
        (4, {TP: 2, CP: 2}),
    ],
    ids=["one", "stages", "experts", "context"],
)
def test_layout_is_megatrons(world_size, overrides, monkeypatch: pytest.MonkeyPatch):
    # A bucket holds little, so that there are several where there may be.
    monkeypatch.setattr("megatron_most.training.optimizer._bucket_size", lambda: 1000)
    for same, messages in run_ranks(world_size, wrap, overrides):
        assert same and all(same)
        assert messages == []
