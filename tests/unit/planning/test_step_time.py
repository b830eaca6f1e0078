"""The roofline of a step."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_most.config import load_config
from megatron_most.planning import GPUS, RowContents, assumed_contents, step_seconds
from megatron_most.planning.step_time import RECOMPUTED
from tests.distributed.tiny import tiny_config

RECIPE = Path(__file__).parents[3] / "examples" / "configs" / "most_16b_stage1.yaml"
H100 = GPUS["h100"]
THREE_LAYERS = ["model.num_layers=3", "parallel.expert_model_parallel_size=1", "training.global_batch_size=1"]


def test_three_layers_take_what_was_measured_on_an_h100() -> None:
    """docs/performance.md: 59.5 ms of the device for a packed row, 63.5 ms for one document with targets everywhere.

    The rate of the experts was taken from the first number; the second one was not used.
    """
    config = load_config(RECIPE, [*THREE_LAYERS, "data.seq_length=4096"])
    packed = assumed_contents(config)
    whole = RowContents(packed.modalities, targets=1, frame_targets=0.5, attended=4097 / 2, source="a test")
    measured = {0.0595: packed, 0.0635: whole}
    for seconds, rows in measured.items():
        assert sum(step_seconds(config, 1, H100, 1.25, rows).values()) == pytest.approx(seconds, rel=0.1)


def test_moonlight_is_estimated_below_its_published_speed() -> None:
    """22,528 tokens/s on H100s for the same layers, with communication overlapped, which is not assumed here."""
    config = load_config(RECIPE)
    rows = dataclasses.replace(assumed_contents(config), targets=1.0, frame_targets=0.0, attended=4097 / 2)
    seconds = sum(step_seconds(config, 64, H100, 1.0, rows).values())
    speed = config.training.global_batch_size * config.data.seq_length / seconds / 64
    assert 0.6 * 22_528 < speed < 22_528


@pytest.mark.parametrize("mode", RECOMPUTED)
def test_recomputation_repeats_the_forward_of_its_parts(mode: str) -> None:
    base, again = tiny_config(), tiny_config(training__recompute=mode)
    rows = assumed_contents(base)
    before, after = (step_seconds(config, 1, H100, 1.25, rows) for config in (base, again))
    repeated = {part for part in before if after[part] > before[part] * 1.001}
    assert repeated == set(RECOMPUTED[mode]) | ({"experts"} if mode == "moe_act" else set())
    for part in RECOMPUTED[mode]:
        assert after[part] == pytest.approx(before[part] * 4 / 3)


def test_work_is_divided_over_ranks_and_messages_cost() -> None:
    config = tiny_config(training__global_batch_size=32)
    rows = assumed_contents(config)
    alone, four = step_seconds(config, 1, H100, 1.25, rows), step_seconds(config, 4, H100, 1.25, rows)
    assert four["attention"] == pytest.approx(alone["attention"] / 4)
    assert "communication" not in alone and four["communication"] > 0
    staged = tiny_config(training__global_batch_size=32, parallel__pipeline_model_parallel_size=4)
    parts = step_seconds(staged, 4, H100, 1.25, rows)
    busy = sum(parts[part] for part in parts if part not in ("pipeline bubble", "optimizer"))
    assert parts["pipeline bubble"] == pytest.approx(busy * 3 / 16, rel=0.2)


def test_the_busiest_expert_rank_counts() -> None:
    split = {"parallel__expert_model_parallel_size": 4, "data__audio_share": 0.8}
    interleaved, contiguous = tiny_config(**split), tiny_config(**split, model__moe__expert_order="contiguous")
    rows = assumed_contents(interleaved)
    even, uneven = (step_seconds(config, 4, H100, 1.0, rows) for config in (interleaved, contiguous))
    assert uneven["dispatch"] > even["dispatch"] and uneven["communication"] > even["communication"]
