"""FLOPs of a token."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_most import parallel
from megatron_most.model import build_model
from megatron_most.planning import RowContents, assumed_contents, forward_flops, modality_shares, train_flops_per_token
from tests.distributed.tiny import tiny_batch, tiny_config

GQA = {"model__attention__type": "gqa", "model__attention__num_query_groups": 2, "model__attention__kv_channels": 12}


@pytest.mark.parametrize("modality", [0, 1])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"model__attention__q_lora_rank": 12},
        GQA,
        {"vocab__layout": "flat", "model__moe__router_weights": "per_modality"},
    ],
    ids=["mla", "q-lora", "gqa", "flat"],
)
def test_products_are_those_the_model_executes(overrides: dict[str, Any], modality: int) -> None:
    groups = "[{modality: text, size: 4, moe_router_topk: 3}, {modality: audio, size: 4, moe_router_topk: 1}]"
    config = tiny_config(model__moe__expert_backend="sequential", model__moe__groups=groups, **overrides)
    parallel.initialize(config.parallel, seed=1)
    [model] = build_model(config)
    batch = tiny_batch(config, seed=1, audio_share=float(modality))
    # No padding, a target at every position, and a frame to predict at every position of audio.
    batch.is_padding.zero_()
    batch = dataclasses.replace(batch, loss_mask=torch.ones_like(batch.loss_mask), code_labels=batch.codes)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(batch.ids, batch.modality, batch.is_padding, batch.codes, targets=batch.targets())
    products = counter.get_flop_counts()["Global"]
    executed = sum(count for operator, count in products.items() if "scaled_dot_product" not in str(operator))
    name = ("text", "audio")[modality]
    rows = dataclasses.replace(
        assumed_contents(config), modalities={name: 1.0}, targets=1.0, frame_targets=float(name == "audio")
    )
    expected = forward_flops(config, name, rows)
    assert executed / batch.ids.numel() == sum(expected.values()) - expected["attention_core"]


def test_heads_count_the_targets_alone() -> None:
    config = tiny_config()
    parallel.initialize(config.parallel, seed=1)
    [model] = build_model(config)
    batch = tiny_batch(config, seed=1, audio_share=0.5)
    targets = batch.targets()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hidden = torch.zeros(config.data.seq_length, len(batch.ids), config.model.hidden_size)
        model.losses(hidden, targets)
    positions = batch.ids.numel()
    rows = dataclasses.replace(
        assumed_contents(config),
        targets=len(targets.index) / positions,
        frame_targets=len(targets.code_index) / positions,
    )
    assert 0 < rows.frame_targets < rows.targets < 1
    mean = sum(share * forward_flops(config, name, rows)["heads"] for name, share in rows.modalities.items())
    assert counter.get_total_flops() == pytest.approx(mean * positions)


def test_attention_counts_what_a_query_may_see() -> None:
    heads, layers, sizes = 4, 4, 12 + 12
    rows = assumed_contents(tiny_config())
    assert rows.attended == sum(range(1, 33)) / 32  # query i of the whole row sees i keys
    attention = forward_flops(tiny_config(), "text", rows)["attention_core"]
    assert attention == layers * heads * 2 * sizes * rows.attended
    packed = tiny_config(data__packing=True, data__seq_length=4096, training__micro_batch_size=1)
    inside = forward_flops(packed, "text", assumed_contents(packed))["attention_core"]
    assert inside == layers * heads * 2 * sizes * 100.5  # documents of 200 positions


def test_the_mean_follows_the_mix() -> None:
    config = tiny_config(
        data__audio_share=0.75,
        model__moe__groups="[{modality: text, size: 4, moe_router_topk: 3},"
        " {modality: audio, size: 4, moe_router_topk: 1}]",
    )
    assert modality_shares(config) == {"text": 0.25, "audio": 0.75}
    rows = assumed_contents(config)
    text, audio = (sum(forward_flops(config, name, rows).values()) for name in ("text", "audio"))
    assert train_flops_per_token(config) == pytest.approx(3 * (0.25 * text + 0.75 * audio))
    even = tiny_config(
        vocab__further_modalities="[{name: image, start: 30, stop: 40}]",
        model__moe__groups="[{modality: text, size: 4, moe_router_topk: 1},"
        " {modality: audio, size: 2, moe_router_topk: 1},"
        " {modality: image, size: 2, moe_router_topk: 1}]",
    )
    assert modality_shares(even) == dict.fromkeys(("text", "audio", "image"), 1 / 3)
    half = dataclasses.replace(even, data=dataclasses.replace(even.data, audio_share=0.5))
    assert modality_shares(half) == {"text": 0.25, "audio": 0.5, "image": 0.25}


def test_deepseek_v2_lite_takes_16_gflop() -> None:
    """At 4096 positions of one document with a target everywhere."""
    config = tiny_config()
    config = dataclasses.replace(
        config,
        model=type(config.model)(),
        vocab=dataclasses.replace(config.vocab, text_vocab_size=102400),
    )
    rows = RowContents({"text": 1.0, "audio": 0.0}, targets=1, frame_targets=0, attended=4097 / 2, source="a test")
    assert 3 * sum(forward_flops(config, "text", rows).values()) / 1e9 == pytest.approx(16.4, abs=0.05)
