"""What --dry-run says."""

from __future__ import annotations

import pytest

from megatron_most.errors import ConfigError
from megatron_most.model import count_parameters
from megatron_most.training.overview import describe_run, memory_per_rank, smallest_world_size
from tests.distributed.tiny import tiny_config


def test_overview_names_layout_parameters_and_memory() -> None:
    config = tiny_config(parallel__expert_model_parallel_size=2)
    text = describe_run(config, world_size=4)
    counts = count_parameters(config)
    for part in ("ranks: 4", "expert 2", "data 4", f"{counts['total']:,} in total", f"{counts['active']:,} active"):
        assert part in text
    assert "hidden_size: 32" in text


def test_a_layout_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="only 1 were started"):
        describe_run(tiny_config(parallel__tensor_model_parallel_size=2), world_size=1)


def test_memory_follows_from_the_counts() -> None:
    config = tiny_config()
    total = count_parameters(config)["total"]
    assert memory_per_rank(config, 1) == {"weights": 4 * total, "gradients": 4 * total, "optimizer": 8 * total}
    bf16 = tiny_config(training__precision="bf16")
    assert memory_per_rank(bf16, 1) == {"weights": 2 * total, "gradients": 4 * total, "optimizer": 12 * total}
    assert memory_per_rank(bf16, 4)["optimizer"] == 3 * total
    assert memory_per_rank(tiny_config(optimizer__distributed=False), 4)["optimizer"] == 8 * total


def test_experts_are_split_over_expert_ranks() -> None:
    config = tiny_config(parallel__expert_model_parallel_size=2)
    counts = count_parameters(config)
    experts = counts["experts/text"] + counts["experts/audio"]
    assert memory_per_rank(config, 2)["weights"] == 4 * (counts["total"] - experts / 2)


def test_smallest_world_size() -> None:
    assert smallest_world_size(tiny_config().parallel) == 1
    both = tiny_config(parallel__tensor_model_parallel_size=2, parallel__expert_model_parallel_size=2)
    assert smallest_world_size(both.parallel) == 4
    assert describe_run(both, 4)
