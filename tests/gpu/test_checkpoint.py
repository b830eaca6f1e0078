"""A checkpoint that a GPU has saved goes on on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_most.checkpointing import save_checkpoint
from megatron_most.training.optimizer import build_optimizer, wrap_model
from tests.distributed.observe import backward, train_step
from tests.distributed.tiny import tiny_config
from tests.gpu.computations import TRAINED, batches_of_step, by_name, filled_model
from tests.unit.checkpointing.test_metadata import metadata_of


def test_a_cpu_reads_the_weights_and_trains_on(tmp_path: Path, on_cpu: Callable[..., Any]) -> None:
    config = tiny_config(**TRAINED)
    chunks = filled_model(config)
    wrapped = wrap_model(config, chunks)
    optimizer = build_optimizer(config, wrapped)
    train_step(config, wrapped, optimizer, batches_of_step(config, 0))
    save_checkpoint(tmp_path, metadata_of(config, step=1, world_size=1), chunks, optimizer, keep_last=1)
    weights = by_name(chunks)
    total, count = backward(config, wrapped, optimizer, batches_of_step(config, 1))[0]
    found = on_cpu("continued", str(tmp_path))
    assert found["weights"].keys() == weights.keys()
    assert all(torch.equal(found["weights"][name], weight) for name, weight in weights.items())
    assert found["table"][0].tolist() == pytest.approx([total, count], rel=2e-3)
