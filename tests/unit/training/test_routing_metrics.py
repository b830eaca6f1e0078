"""What is logged about routing, from sums small enough to check by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megatron_most.config import CommonExpertsConfig, ExpertGroupConfig, MoEConfig
from megatron_most.training.routing_metrics import RoutingMetrics

GROUPS = MoEConfig(groups=[ExpertGroupConfig("text", 2, 1), ExpertGroupConfig("audio", 2, 1)])


def layer(
    number: int,
    text: list[int],
    audio: list[int],
    balance_loss: float = 0.0,
    text_scores: list[float] | None = None,
    entropy: float = 0.0,
    rank_imbalance: tuple[float, int] = (0.0, 0),
) -> dict[str, Any]:
    """Sums of one layer of four experts, each token with one pair."""
    return {
        "layer": number,
        "pairs": {"text": text, "audio": audio},
        "scores": {"text": text_scores or [0.0] * 4, "audio": [0.0] * 4},
        "entropy": {"text": entropy, "audio": 0.0},
        "tokens": {"text": sum(text), "audio": sum(audio)},
        "outside_group": sum(text[2:]) + sum(audio[:2]),
        "balance_loss": balance_loss,
        "z_loss": 0.0,
        "orthogonality_loss": 0.0,
        "rank_imbalance": list(rank_imbalance),
    }


def test_sums_of_several_calls_add_up_layer_by_layer() -> None:
    metrics = RoutingMetrics(GROUPS)
    metrics.add([layer(2, [1, 3, 0, 0], [0, 0, 0, 4], 8.0), layer(3, [2, 2, 0, 0], [0, 0, 0, 4], 16.0)])
    metrics.add([])
    metrics.add([layer(3, [6, 6, 0, 0], [0, 1, 0, 3], 16.0), layer(2, [5, 7, 0, 0], [0, 0, 0, 4], 48.0)])
    second, third = metrics.layers()
    assert (second["layer"], third["layer"]) == (2, 3)
    assert second["pairs"] == {"text": [6, 10, 0, 0], "audio": [0, 0, 0, 8]}
    assert second["tokens"] == {"text": 16, "audio": 8}
    assert (second["outside_group"], third["outside_group"]) == (0, 1)
    # 24 tokens in each layer.
    assert metrics.metrics()["balance_loss"] == (8 + 16 + 16 + 48) / 48


def test_each_layer_is_described_within_the_choice() -> None:
    metrics = RoutingMetrics(GROUPS)
    metrics.add([layer(2, [6, 2, 0, 0], [0, 0, 5, 0], text_scores=[3.0, 1.0, 2.0, 2.0], entropy=4.0)])
    (described,) = metrics.layers()
    assert described["mean_score"]["text"] == [0.375, 0.125, 0.25, 0.25]
    assert described["dead_experts"] == {"text": 0, "audio": 1}
    assert described["max_over_mean"] == {"text": 1.5, "audio": 2.0}
    assert described["entropy"]["text"] == 0.5
    assert described["outside_mass"] == {"text": 0.5, "audio": 0.0}
    assert "ep_max_over_mean" not in described


def test_scalars_are_the_mean_and_the_worst_over_layers() -> None:
    metrics = RoutingMetrics(GROUPS)
    metrics.add(
        [
            layer(2, [4, 0, 0, 0], [0, 0, 0, 0], entropy=4.0, rank_imbalance=(6.0, 4)),
            layer(3, [2, 2, 0, 0], [0, 0, 0, 0], entropy=2.0, text_scores=[1, 1, 1, 1], rank_imbalance=(4.0, 4)),
        ]
    )
    assert metrics.metrics() == {
        "routing/text/dead_experts/mean": 0.5,
        "routing/text/dead_experts/max": 1,
        "routing/text/max_over_mean/mean": 1.5,
        "routing/text/max_over_mean/max": 2.0,
        "routing/text/entropy/mean": 0.75,
        "routing/text/entropy/min": 0.5,
        "routing/text/outside_mass/mean": 0.25,
        "routing/text/outside_mass/max": 0.5,
        "routing/ep_max_over_mean/mean": 1.25,
        "routing/ep_max_over_mean/max": 1.5,
    }


def test_a_modality_without_tokens_is_left_out_of_a_layer() -> None:
    metrics = RoutingMetrics(GROUPS)
    metrics.add([layer(2, [1, 1, 0, 0], [0, 0, 0, 0]), layer(3, [1, 1, 0, 0], [0, 0, 2, 0])])
    second, third = metrics.layers()
    assert set(second["entropy"]) == {"text"}
    assert set(third["entropy"]) == {"text", "audio"}
    assert metrics.metrics()["routing/audio/max_over_mean/mean"] == 2.0


def test_common_experts_belong_to_the_choice_of_those_who_may_choose_them() -> None:
    moe = MoEConfig(
        groups=[ExpertGroupConfig("text", 1, 1), ExpertGroupConfig("audio", 1, 1)],
        common=CommonExpertsConfig(2, modalities=["text"]),
    )
    metrics = RoutingMetrics(moe)
    metrics.add([layer(2, [1, 0, 2, 0], [0, 3, 0, 0], text_scores=[0.5, 0.25, 1.5, 0.75])])
    (described,) = metrics.layers()
    assert described["dead_experts"] == {"text": 1, "audio": 0}
    assert described["max_over_mean"]["text"] == 2.0
    assert described["outside_mass"]["text"] == pytest.approx(0.25 / 3, rel=1e-4)
    assert math.isclose(metrics.metrics()["routing/text/outside_mass/max"], 0.25 / 3)
