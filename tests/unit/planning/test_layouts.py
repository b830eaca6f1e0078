"""The search for layouts that fit."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from megatron_most.config import RunConfig, dump_config
from megatron_most.config.load import build_config
from megatron_most.errors import ConfigError
from megatron_most.planning import Gpu, fitting_layouts, memory_per_rank
from megatron_most.planning.overview import describe_layouts
from tests.distributed.tiny import tiny_config

MIB = 1 << 20


def sized(mebibytes: float, **bandwidths: float) -> Gpu:
    """A GPU of which a plan may fill so much."""
    return Gpu(memory=mebibytes * MIB / 0.9 + (3 << 30), peak=1e12, memory_bandwidth=1e12, **bandwidths)


def applied(config: RunConfig, overrides: list[str]) -> RunConfig:
    return build_config("config", yaml.safe_load(dump_config(config)), overrides)


def test_layouts_are_valid_fit_and_are_sorted() -> None:
    config = tiny_config(training__global_batch_size=16)
    least = min(layout.memory for layout in fitting_layouts(config, 8, sized(1000)))
    gpu = sized(2 * least / MIB)
    layouts = fitting_layouts(config, 8, gpu)
    assert 1 < len(layouts) < len(fitting_layouts(config, 8, sized(1000)))
    order = [(layout.seconds, layout.memory) for layout in layouts]
    assert order == sorted(order)
    assert len({str(layout.parallel) for layout in layouts}) == len(layouts)
    for layout in layouts[:5] + layouts[-5:]:
        same = applied(config, layout.overrides(config))
        assert (same.parallel, same.training.recompute) == (layout.parallel, layout.recompute)
        assert same.num_microbatches(same.parallel.data_parallel_size(8)) == layout.micro_batches
        fullest = max(estimate.total for estimate in memory_per_rank(same, 8).values())
        assert fullest == layout.memory <= gpu.usable
        assert dataclasses.replace(same, parallel=config.parallel, training=config.training) == config


def test_nothing_is_split_without_need() -> None:
    [best, *_] = fitting_layouts(tiny_config(), 4, sized(1000))
    assert best.parallel == tiny_config().parallel
    assert best.recompute == "none"


def test_recomputation_is_taken_where_memory_asks_for_it() -> None:
    config = tiny_config(data__seq_length=4096)
    [roomy] = fitting_layouts(config, 1, sized(10_000))
    [tight] = fitting_layouts(config, 1, sized(0.96 * roomy.memory / MIB))
    [tighter] = fitting_layouts(config, 1, sized(0.9 * roomy.memory / MIB))
    assert (roomy.recompute, tight.recompute, tighter.recompute) == ("none", "moe_act", "moe")
    assert roomy.seconds < tight.seconds < tighter.seconds


def test_a_slow_network_keeps_experts_inside_a_node() -> None:
    config = tiny_config(training__global_batch_size=32, training__micro_batch_size=1, data__seq_length=4096)
    wide = [layout for layout in fitting_layouts(config, 16, sized(10_000, network_bandwidth=1e6))][0]
    assert wide.parallel.expert_model_parallel_size * wide.parallel.expert_tensor_size <= 8


def test_what_cannot_fit_names_the_layout_that_needs_least() -> None:
    with pytest.raises(
        ConfigError, match="--gpus=2: nothing fits 0.0 GiB; the least is 0.0 GiB, with parallel.*training.recompute="
    ):
        fitting_layouts(tiny_config(), 2, sized(0.1))
    with pytest.raises(ConfigError, match="--gpus=16: no layout suits the model and training.global_batch_size=1"):
        fitting_layouts(
            tiny_config(training__global_batch_size=1, training__micro_batch_size=1, data__seq_length=33),
            16,
            sized(100),
        )


def test_the_table_shows_the_first_layouts_and_how_to_take_the_best() -> None:
    long = {"data__seq_length": 4096, "training__global_batch_size": 64}
    lines = describe_layouts(tiny_config(**long), 4, "h100", 1.25, limit=2).splitlines()
    assert "layouts of 4 x h100 fit 68.4 GiB" in lines[0]
    assert lines[2].endswith("1.00")
    assert lines[4] == "the first as overrides: none, the configuration has it"
    split = tiny_config(**long, parallel__tensor_model_parallel_size=2)
    overrides = describe_layouts(split, 4, "h100", 1.25, limit=2).splitlines()[4]
    assert overrides == "the first as overrides: parallel.tensor_model_parallel_size=1"
