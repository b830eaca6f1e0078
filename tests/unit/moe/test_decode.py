"""The experts on one position of each row, as generation has it: what the dispatcher's way gives, without waiting."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_most import parallel
from megatron_most.model import build_model
from megatron_most.moe.token_planes import pack_planes
from tests.distributed.tiny import tiny_config
from tools.bench.launches import Counting

ROWS, HIDDEN, WIDTH = 7, 32, 24
GROUPS = "[{modality: text, size: %d, moe_router_topk: %d}, {modality: audio, size: %d, moe_router_topk: %d}]"
LAYERS = {
    "one top-k": {},
    "unequal top-k": {"groups": GROUPS % (5, 3, 3, 1)},
    "common experts": {"groups": GROUPS % (3, 2, 3, 2), "common": "{size: 2}"},
    "a modality without experts of its own": {"groups": GROUPS % (0, 2, 4, 2), "common": "{size: 4}"},
    "sigmoid, normalized": {"moe_router_score_function": "sigmoid", "norm_topk_prob": True},
    "no shared expert": {"moe_shared_expert_intermediate_size": 0},
    "one after another": {"expert_backend": "sequential"},
}


@pytest.fixture(scope="module", autouse=True)
def process_groups():
    parallel.initialize(tiny_config().parallel, seed=1)
    yield
    parallel.destroy()


def moe_layer(**options: object) -> MoELayer:
    [model] = build_model(tiny_config(**{f"model__moe__{name}": value for name, value in options.items()}))
    return model.eval().decoder.layers[1].mlp


def position(modality: list[int], padding: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states ``[1, b, h]`` and planes."""
    is_padding = torch.tensor([[row in padding] for row in range(len(modality))])
    hidden = torch.randn(1, len(modality), HIDDEN, generator=torch.Generator().manual_seed(1))
    return hidden, pack_planes(torch.tensor(modality)[:, None], is_padding, 2)


POSITIONS = {
    "both modalities": ([0, 1, 1, 0, 1, 0, 0], ()),
    "text alone": ([0] * ROWS, ()),
    "audio alone": ([1] * ROWS, ()),
    "padding between": ([0, 1, 1, 0, 1, 0, 0], (0, 2, 6)),
    "padding alone": ([0, 1], (0, 1)),
    "one row": ([1], ()),
}


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("rows", POSITIONS.values(), ids=POSITIONS)
def test_the_sum_is_that_of_the_dispatcher(options: dict[str, object], rows: tuple[list[int], tuple[int, ...]]) -> None:
    layer, (hidden, planes) = moe_layer(**options), position(*rows)
    expected, _ = layer(hidden, padding_mask=planes)  # with gradients, as in training
    with torch.no_grad():
        found, bias = layer(hidden, padding_mask=planes)
    assert bias is None
    torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=1e-7)
    padding = list(rows[1])
    shared = layer.shared_experts(hidden) if layer.use_shared_expert else torch.zeros_like(hidden)
    assert torch.equal(found[:, padding], shared.detach()[:, padding])


def test_nothing_is_asked_of_the_host() -> None:
    layer, (hidden, planes) = moe_layer(), position(*POSITIONS["padding between"])
    layer.token_dispatcher = None
    with torch.no_grad(), Counting() as count:
        layer(hidden, padding_mask=planes)
    assert not count.waits
    assert not {"nonzero_static", "scatter_add_"} & set(count.operators)


def test_padding_and_places_left_over_go_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product reads their rows, and what it leaves in memory there never reaches a token."""
    grouped_mm, ends = torch.nn.functional.grouped_mm, []

    def dirty(rows: torch.Tensor, weights: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        out = grouped_mm(rows, weights, offs=offs)
        ends.append(int(offs[-1]))
        out[ends[-1] :] = float("nan")
        return out

    layer, (hidden, planes) = moe_layer(groups=GROUPS % (5, 3, 3, 1)), position(*POSITIONS["padding between"])
    expected, _ = layer(hidden, padding_mask=planes)
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", dirty)
    with torch.no_grad():
        found, _ = layer(hidden, padding_mask=planes)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=1e-7)
    assert ends == [6, 8, 6, 8]  # two tokens of text with three experts, two of audio with one
