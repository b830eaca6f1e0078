"""Every parallel layout computes what one process computes: losses, routing, every gradient, updates; in fp32."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.distributed.harness import run_ranks
from tests.distributed.observe import Observation, assert_same, observe, observe_each, starting_weights
from tests.distributed.shards import assemble

pytestmark = pytest.mark.invariance

TP, PP = "parallel__tensor_model_parallel_size", "parallel__pipeline_model_parallel_size"
EP, ETP = "parallel__expert_model_parallel_size", "parallel__expert_tensor_parallel_size"
CP = "parallel__context_parallel_size"
VPP = "parallel__virtual_pipeline_model_parallel_size"
MICRO, RECOMPUTE = "training__micro_batch_size", "training__recompute"
UNSHARDED = {"optimizer__use_distributed_optimizer": False, "optimizer__overlap_grad_reduce": False}
Overrides = dict[str, Any]

LAYOUTS: dict[str, tuple[int, Overrides]] = {
    "one-by-one": (1, {MICRO: 1}),
    "all-at-once": (1, {MICRO: 4}),
    "tp2": (2, {TP: 2}),
    "tp2-etp1": (2, {TP: 2, ETP: 1}),
    "ep2": (2, {EP: 2}),
    "ep2-allgather": (2, {EP: 2, "model__moe__moe_token_dispatcher_type": "allgather"}),
    "ep2-contiguous": (2, {EP: 2, "model__moe__expert_order": "contiguous"}),
    "pp2": (2, {PP: 2}),
    "pp2-vpp2": (2, {PP: 2, VPP: 2}),
    "cp2": (2, {CP: 2}),
    "dp2": (2, {}),
    "dp2-unsharded": (2, UNSHARDED),
    "ep4": (4, {EP: 4, MICRO: 1}),
    "ep4-allgather": (4, {EP: 4, MICRO: 1, "model__moe__moe_token_dispatcher_type": "allgather"}),
    "tp2-ep2-etp1": (4, {TP: 2, EP: 2, ETP: 1}),
    "tp2-ep2-etp2": (4, {TP: 2, EP: 2}),
    "tp2-pp2": (4, {TP: 2, PP: 2}),
    "cp2-ep2": (4, {CP: 2, EP: 2}),
    "tp2-ep2-cp2": (4, {TP: 2, EP: 2, CP: 2}),
    "pp2-vpp2-ep2": (4, {PP: 2, VPP: 2, EP: 2, MICRO: 1}),
    "dp2-ep2": (4, {EP: 2, MICRO: 1}),
    "dp2-ep2-no-overlap": (4, {EP: 2, MICRO: 1, "optimizer__overlap_grad_reduce": False}),
    "dp2-ep2-unsharded": (4, {EP: 2, MICRO: 1, **UNSHARDED}),
}
EIGHT_RANKS: dict[str, tuple[int, Overrides]] = {
    "tp2-pp2-cp2-ep2": (8, {TP: 2, PP: 2, CP: 2, EP: 2}),
    "tp2-pp2-vpp2-ep2": (8, {TP: 2, PP: 2, VPP: 2, EP: 2, MICRO: 1}),
    "tp2-pp2-ep4-etp1": (8, {TP: 2, PP: 2, EP: 4, ETP: 1}),
    "tp2-cp2-ep2-dp2": (8, {TP: 2, CP: 2, EP: 2, ETP: 1}),
    "pp2-cp2-ep4": (8, {PP: 2, CP: 2, EP: 4}),
    "pp4-ep2": (8, {PP: 4, EP: 2}),
}
CODECS: dict[str, Overrides] = {"frame": {}, "flat": {"vocab__layout": "flat"}}
MODES = {"none": 5, "moe": 2, "full": 2}
"""Recomputation -> optimizer steps."""

THREE_MODALITIES = [
    {"modality": "text", "size": 3, "moe_router_topk": 2},
    {"modality": "audio", "size": 4, "moe_router_topk": 3, "moe_router_num_groups": 3, "moe_router_group_topk": 2},
    {"modality": "image", "size": 3, "moe_router_topk": 1, "moe_aux_loss_coeff": 0.03, "moe_z_loss_coeff": 0.0},
]
_GQA: Overrides = {
    "model__attention__type": "gqa",
    "model__attention__num_query_groups": 2,
    "model__attention__kv_channels": 12,
}
VARIANTS: dict[str, Overrides] = {
    "packed": {"data__packing": True, "data__document_multiple": 4, MICRO: 1},
    "q-lora": {"model__attention__q_lora_rank": 20},
    "gqa": _GQA,
    "score-all": {"model__moe__score_rule": "all", "model__moe__expert_order": "contiguous"},
    "sequential": {"model__moe__expert_backend": "sequential"},
    # Everything of the router that the defaults leave out.
    "sigmoid": {
        "model__moe__groups": [
            {
                "modality": "text",
                "size": 4,
                "moe_router_topk": 3,
                "moe_router_num_groups": 3,
                "moe_router_group_topk": 2,
            },
            {"modality": "audio", "size": 2, "moe_router_topk": 1},
        ],
        "model__moe__common__size": 2,
        "model__moe__moe_router_score_function": "sigmoid",
        "model__moe__norm_topk_prob": True,
        "model__moe__moe_router_topk_scaling_factor": 2.5,
        "model__moe__moe_router_bias_update_rate": 1e-2,
        "model__moe__orthogonality_coeff": 1e-2,
    },
    "modalities": {
        "vocab__further_modalities": [{"name": "image", "start": 25, "stop": 40}],
        "model__moe__groups": THREE_MODALITIES,
        "model__moe__common": {"size": 2, "modalities": ["audio", "image"]},
        "model__moe__router_weights": "per_modality",
    },
    "qwen": {
        **_GQA,
        "model__attention__qk_layernorm": "head",
        "model__attention__add_qkv_bias": True,
        "model__moe__moe_shared_expert_gate": True,
        "model__share_embeddings_and_output_weights": True,
    },
    "olmoe": {**_GQA, "model__attention__qk_layernorm": "all_heads"},
    "moonlight": {
        "model__attention__latent_layernorm_epsilon": 0.1,
        "model__moe__moe_router_score_function": "sigmoid",
        "model__moe__norm_topk_prob": True,
        "model__moe__moe_router_bias_update_rate": 1e-2,
    },
    "micro-batch-balance": {"model__moe__moe_router_load_balancing_type": "aux_loss"},
    "global-balance": {
        "model__moe__moe_router_load_balancing_type": "global_aux_loss",
        "model__moe__balance_scope": "pooled",
        "model__moe__norm_topk_prob": True,
    },
}
RECOMPUTED: dict[str, tuple[int, Overrides]] = {"pp2-recompute": (2, {PP: 2, RECOMPUTE: "full"})}
VARIANT_LAYOUTS = {
    "packed": ("tp2", "ep2", "pp2-vpp2", "cp2"),
    "q-lora": ("tp2",),
    "gqa": ("tp2", "pp2", "cp2-ep2"),
    "score-all": ("tp2", "ep2", "pp2-vpp2"),
    "sequential": ("ep2", "tp2-ep2-etp2"),
    "sigmoid": ("ep2", "tp2-ep2-etp1", "pp2-vpp2", "cp2-ep2", "dp2-ep2"),
    "modalities": ("tp2", "ep2", "cp2", "dp2-ep2"),
    "qwen": ("tp2", "ep2", "pp2", "tp2-pp2"),
    "olmoe": ("tp2", "ep2", "pp2"),
    "moonlight": ("tp2", "ep2", "pp2"),
    "micro-batch-balance": ("tp2", "cp2", "pp2-recompute"),
    # Its fractions are those of the step so far: data parallelism, which does more at a time, gives others.
    "global-balance": ("tp2", "cp2"),
}
SLOW = {("qwen", "ep2"), ("qwen", "pp2"), ("olmoe", "ep2"), ("olmoe", "pp2")} | {
    ("moonlight", layout) for layout in ("tp2", "ep2", "pp2")
}
"""Rows that others cover in part."""


@functools.cache
def one_process(variant: str) -> Observation:
    """What one process computes, without distributed optimizer and recomputation."""
    [observation] = run_ranks(1, observe, {**CODECS, **VARIANTS}[variant] | UNSHARDED)
    return observation


def check(world_size: int, runs: list[tuple[str, Overrides, int]], timeout: float = 120) -> None:
    """Compare runs (variant, further overrides, steps) on ``world_size`` ranks with one process."""
    resolved = [({**CODECS, **VARIANTS}[variant] | further, num_steps) for variant, further, num_steps in runs]
    ranks = run_ranks(world_size, observe_each, resolved, timeout=timeout)
    for (variant, *_), observations in zip(runs, zip(*ranks, strict=True), strict=True):
        assert_same(observations, one_process(variant))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(layout):
    """With every recomputation; the other codec layout with the one that changes most."""
    world_size, overrides = LAYOUTS[layout]
    runs = [("frame", overrides | {RECOMPUTE: mode}, num_steps) for mode, num_steps in MODES.items()]
    check(world_size, [*runs, ("flat", overrides | {RECOMPUTE: "full"}, 2)])


@pytest.mark.parametrize(
    "variant, layout",
    [
        pytest.param(variant, layout, marks=pytest.mark.slow if (variant, layout) in SLOW else ())
        for variant, layouts in VARIANT_LAYOUTS.items()
        for layout in layouts
    ],
)
def test_variant_equals_one_process(variant, layout):
    world_size, overrides = {**LAYOUTS, **RECOMPUTED}[layout]
    check(world_size, [(variant, overrides, 2)])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", EIGHT_RANKS)
def test_eight_ranks_equal_one_process(layout):
    world_size, overrides = EIGHT_RANKS[layout]
    runs = [("frame", overrides | {RECOMPUTE: mode}, 5) for mode in MODES]
    check(world_size, [*runs, ("flat", overrides | {RECOMPUTE: "full"}, 5)], timeout=500)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", ["flat", "sigmoid", "modalities"])
def test_variant_equals_one_process_everywhere(variant, layout):
    world_size, overrides = LAYOUTS[layout]
    check(world_size, [(variant, overrides | {RECOMPUTE: mode}, 5) for mode in MODES], timeout=500)


@pytest.mark.parametrize("variant", ["frame", "q-lora", "gqa", "modalities", "qwen", "olmoe"])
def test_every_weight_has_a_gradient(variant):
    gradients = assemble([one_process(variant).gradients])
    assert {name for name, gradient in gradients.items() if not gradient.any()} == set()


def test_every_weight_moves():
    before, after = assemble(run_ranks(1, starting_weights, {})), assemble([one_process("frame").weights[5]])
    assert {name for name, weight in after.items() if (weight - before[name]).abs().max() < 1e-3} == set()
