"""What --dry-run says."""

from __future__ import annotations

import pytest

from megatron_most.errors import ConfigError
from megatron_most.model import count_parameters
from megatron_most.training.overview import describe_experts, describe_run, memory_per_rank, smallest_world_size
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


MODALITIES = {
    "vocab__further_modalities": "[{name: image, start: 30, stop: 40}]",
    "model__moe__groups": "[{modality: text, size: 6, top_k: 2}, {modality: audio, size: 2, top_k: 3},"
    " {modality: image, size: 0, top_k: 1}]",
    "model__moe__common": "{size: 4, modalities: [audio, image]}",
}


def test_pools_and_equal_shares_are_one_line_each() -> None:
    config = tiny_config(parallel__expert_model_parallel_size=2, **MODALITIES)
    text = describe_run(config, world_size=2)
    assert "experts in each MoE layer: text 6, audio 2, common 4; a token is sent to: text 2 of 6" in text
    assert "audio 3 of 6, image 1 of 4" in text
    assert "each expert-parallel rank holds: text 3, audio 1, common 2" in text
    assert "experts/common" in text


def test_unequal_shares_are_a_table() -> None:
    moe = tiny_config(model__moe__expert_order="contiguous", **MODALITIES).model.moe
    assert describe_experts(moe, 6)[2:] == [
        "  rank  text  audio  common",
        "   0-2     2      0       0",
        "     3     0      2       0",
        "   4-5     0      0       2",
    ]


def test_experts_of_every_pool_count() -> None:
    one, two = tiny_config(**MODALITIES), tiny_config(model__moe__router_weights="per_modality", **MODALITIES)
    counts = count_parameters(one)
    expert = 3 * 3 * 32 * 24  # three MoE layers, three matrices
    pools = {"experts/text": 6 * expert, "experts/audio": 2 * expert, "experts/common": 4 * expert}
    assert {name: count for name, count in counts.items() if name.startswith("experts/")} == pools
    split = count_parameters(two)
    assert split["total"] - counts["total"] == 2 * 3 * 12 * 32  # two more router matrices in each layer
    assert split["active"] == counts["active"]
    assert memory_per_rank(one, 1)["weights"] == 4 * counts["total"]
    half = tiny_config(parallel__expert_model_parallel_size=2, **MODALITIES)
    assert memory_per_rank(half, 2)["weights"] == 4 * (counts["total"] - sum(pools.values()) / 2)
