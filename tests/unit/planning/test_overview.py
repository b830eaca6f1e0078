"""What --dry-run says."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_most.config import CheckpointConfig
from megatron_most.errors import ConfigError
from megatron_most.model import count_parameters
from megatron_most.planning import (
    GPUS,
    assumed_contents,
    describe_run,
    shard_sizes,
    smallest_world_size,
    step_seconds,
    train_flops_per_token,
)
from megatron_most.planning.overview import (
    describe_experts,
    describe_memory,
    describe_shards,
    describe_storage,
    describe_time,
)
from megatron_most.planning.storage import checkpoint_bytes, host_bytes_of_node, num_checkpoints
from tests.distributed.tiny import tiny_config


def test_overview_names_layout_parameters_flops_and_memory() -> None:
    config = tiny_config(parallel__expert_model_parallel_size=2)
    text = describe_run(config, world_size=4)
    counts = count_parameters(config)
    for part in ("ranks: 4", "expert 2", "data 4", f"{counts['total']:,} in total", f"{counts['active']:,} active"):
        assert part in text
    assert "hidden_size: 32" in text
    assert "GFLOP to train on a token: text " in text
    assert "fits, with room for CUDA and fragments: h100: yes, h200: yes" in text
    assert "frozen" not in text


def test_a_layout_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="only 1 were started"):
        describe_run(tiny_config(parallel__tensor_model_parallel_size=2), world_size=1)


def test_frozen_parts_are_named() -> None:
    config = tiny_config(optimizer__lr_scales="[{part: rest, scale: 0}, {part: experts.audio, scale: 1}]")
    assert "frozen: experts.text, shared_experts, routers, dense_ffn, attention" in describe_run(config, 1)


def test_smallest_world_size() -> None:
    assert smallest_world_size(tiny_config().parallel) == 1
    both = tiny_config(parallel__tensor_model_parallel_size=2, parallel__expert_model_parallel_size=2)
    assert smallest_world_size(both.parallel) == 4
    assert describe_run(both, 4)


MODALITIES = {
    "vocab__further_modalities": "[{name: image, start: 30, stop: 40}]",
    "model__moe__groups": "[{modality: text, size: 6, moe_router_topk: 2},"
    " {modality: audio, size: 2, moe_router_topk: 3},"
    " {modality: image, size: 0, moe_router_topk: 1}]",
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


def test_ranks_that_hold_the_same_share_a_line() -> None:
    expert = {"parallel__expert_model_parallel_size": 4}
    title, names, *same = describe_shards(tiny_config(**expert))
    assert (title, names.split()[:4]) == ("parameters on a rank:", ["pipeline", "rank", "expert", "rank"])
    assert [line.split()[:2] for line in same] == [["0", "0-3"]]
    contiguous = {**expert, "model__moe__expert_order": "contiguous"}
    _, _, *apart = describe_shards(tiny_config(**contiguous))
    assert [line.split()[:2] for line in apart] == [["0", "0-1"], ["0", "2-3"]]
    four_stages = tiny_config(**contiguous, parallel__pipeline_model_parallel_size=4)
    _, _, *stages = describe_shards(four_stages)
    # The dense layer has no experts, so its stage needs one line; the stages between first and last are alike.
    assert [line.split()[:2] for line in stages] == [
        ["0", "0-3"],
        ["1-2", "0-1"],
        ["1-2", "2-3"],
        ["3", "0-1"],
        ["3", "2-3"],
    ]


def test_tensor_ranks_have_other_ids() -> None:
    """40 text ids in tables of 128 rows: the first of four ranks has 32 of them, the last two have none."""
    config = tiny_config(
        parallel__tensor_model_parallel_size=4,
        parallel__pipeline_model_parallel_size=2,
        model__moe__expert_backend="sequential",
    )
    _, names, *lines = describe_shards(config)
    assert names.split()[:7] == ["pipeline", "rank", "tensor", "rank", "expert", "rank", "total"]
    assert [line.split()[:3] for line in lines] == [
        [stage, tensor, "0"] for stage in ("0", "1") for tensor in ("0", "1", "2-3")
    ]
    assert [line.split()[-4:-2] for line in lines[:3]] == [["1,024", "2,048"], ["256", "2,816"], ["0", "3,072"]]


def test_memory_names_the_mix_and_the_imbalance() -> None:
    config = tiny_config(
        parallel__expert_model_parallel_size=2, model__moe__expert_order="contiguous", data__audio_share=0.8
    )
    text = "\n".join(describe_memory(config, 2, 1.5, assumed_contents(config)))
    assert "busiest expert-parallel rank: 1.60 of the mean at text 20%, audio 80%, x 1.5 for uneven routers" in text


def test_time_names_its_parts_and_the_days() -> None:
    config = tiny_config(precision__dtype="bf16", training__train_iters=86_400)
    rows = assumed_contents(config)
    seconds = sum(step_seconds(config, 1, GPUS["h100"], 1.25, rows).values())
    step, parts, days = describe_time(config, 1, "h100", 1.25, rows, tflops=1e-3)
    assert "estimated by a roofline and not measured" in step and f"{seconds:.3g} s" in step
    names = ("attention", "router", "dispatch", "experts", "shared expert", "dense layers", "embeddings")
    for part in (*names, "heads and loss", "weight gradients", "optimizer"):
        assert f"{part} " in parts
    assert days.startswith(f"86,400 steps: {seconds:,.2g} days at that speed, ")
    flops = 8 * 32 * train_flops_per_token(config, rows)
    assert f"{flops / 1e9:,.2g} days at 0.001 TFLOP/s a GPU" in days
    assert describe_time(tiny_config(), 1, "h100", 1.25, rows) == []


def test_storage_counts_checkpoints_and_host_memory() -> None:
    config = tiny_config(
        precision__dtype="bf16", checkpoint__save_interval=100, checkpoint__keep_last=2, training__train_iters=1000
    )
    total = count_parameters(config)["total"]
    assert checkpoint_bytes(config) == 14 * total
    assert num_checkpoints(config) == 3
    assert num_checkpoints(dataclasses.replace(config, checkpoint=CheckpointConfig(100, True, 2, 500))) == 5
    assert num_checkpoints(dataclasses.replace(config, checkpoint=CheckpointConfig(1000))) == 1
    written, most = host_bytes_of_node(config, 16)
    assert (written, most) == (14 * total / 2, 14 * total / 2 + 8 * 12 * total)
    frozen = tiny_config(
        precision__dtype="bf16", optimizer__lr_scales="[{part: rest, scale: 0}, {part: heads, scale: 1}]"
    )
    sizes = shard_sizes(frozen, 0, 0)
    assert checkpoint_bytes(frozen) == 2 * total + 12 * (sizes["heads"] + sizes["heads.audio"])
    assert "a checkpoint: " in describe_storage(config, 16)[0]
