"""A checkpoint that a GPU has saved goes on on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_most.checkpointing import save_checkpoint
from megatron_most.training.microbatches import sum_over_ranks
from megatron_most.training.train_step import build_train_state, compute_gradients, train_step
from tests.distributed.tiny import tiny_config
from tests.gpu.computations import TRAINED, batches_of_step, by_name, fill_rounded
from tests.unit.checkpointing.test_metadata import metadata_of


def test_a_cpu_reads_the_weights_and_trains_on(tmp_path: Path, on_cpu: Callable[..., Any]) -> None:
    config = tiny_config(**TRAINED)
    state = build_train_state(config, fill_rounded)
    train_step(state, batches_of_step(config, 0))
    metadata = metadata_of(config, step=1, world_size=1)
    save_checkpoint(tmp_path, metadata, state.model_chunks, state.optimizer, keep_last=1)
    weights = by_name(state.model_chunks)
    total, count = sum_over_ranks(compute_gradients(state, batches_of_step(config, 1)))[0]
    found = on_cpu("continued", str(tmp_path))
    assert found["weights"].keys() == weights.keys()
    assert all(torch.equal(found["weights"][name], weight) for name, weight in weights.items())
    assert found["table"][0].tolist() == pytest.approx([total, count], rel=2e-3)
