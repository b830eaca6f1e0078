"""Rules and blocks: every row is used once in both directions, for any shape."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_most import parallel
from megatron_most.checkpointing.regions import Region
from megatron_most.checkpointing.state import _model_state
from megatron_most.config import RunConfig
from megatron_most.config.load import build_config
from megatron_most.conversion.architectures.deepseek import DeepSeekV2
from megatron_most.conversion.architectures.dense import Llama
from megatron_most.conversion.native import native_shapes
from megatron_most.conversion.tables import HEAD_RULE
from megatron_most.conversion.weight_map import (
    Correspondence,
    IdRun,
    Origin,
    all_blocks,
    cut,
    cut_block,
    open_regions,
)
from megatron_most.model import build_model
from tests.distributed.tiny import tiny_config

VARIANTS = {
    "plain": {},
    "queries compressed": {"model__attention__q_lora_rank": 12},
    "flat layout": {"vocab__layout": "flat"},
    "no shared expert, three dense layers": {
        "model__moe__moe_shared_expert_intermediate_size": 0,
        "model__first_k_dense_replace": 3,
    },
    "a router each, biases": {
        "model__moe__router_weights": "per_modality",
        "model__moe__moe_router_score_function": "sigmoid",
        "model__moe__moe_router_bias_update_rate": 1e-3,
    },
    "grouped-query attention": {
        "model__attention__type": "gqa",
        "model__attention__num_query_groups": 2,
        "model__attention__kv_channels": 8,
    },
    "experts one by one, common ones": {"model__moe__expert_backend": "sequential", "model__moe__common__size": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_are_those_of_the_model_that_is_built(variant):
    config = tiny_config(**VARIANTS[variant])
    parallel.initialize(config.parallel, config.seed)
    try:
        [state] = _model_state(build_model(config)).values()
        built = {}
        for value in state.values():
            pieces = value.build() if hasattr(value, "build") else value
            for piece in [pieces] if not isinstance(pieces, (list, dict)) else pieces:
                built[piece.key] = tuple(piece.global_shape)
    finally:
        parallel.destroy()
    assert built == native_shapes(config)


def config_of(layers: int, dense: int, experts: int, groups: int, heads: int, kind: str) -> RunConfig:
    attention = {"type": kind, "num_attention_heads": heads * groups, "num_query_groups": groups, "kv_channels": 4}
    attention |= {"kv_lora_rank": 6, "qk_head_dim": 4, "qk_pos_emb_head_dim": 2, "v_head_dim": 3}
    moe = {
        "groups": [
            {"modality": "text", "size": experts, "moe_router_topk": 1},
            {"modality": "audio", "size": experts + 1, "moe_router_topk": 1},
        ],
        "moe_ffn_hidden_size": 8,
        "moe_shared_expert_intermediate_size": 8,
        "expert_backend": "sequential",
    }
    model = {"num_layers": layers, "first_k_dense_replace": dense, "hidden_size": 12, "ffn_hidden_size": 8}
    return build_config(
        "test",
        {
            "vocab": {"text_vocab_size": 30, "num_codebooks": 2, "codebook_size": 5},
            "model": {**model, "attention": attention, "moe": moe},
        },
    )


@settings(max_examples=25)
@given(st.data())
def test_every_foreign_row_has_its_place_and_every_native_row_one_source(data):
    layers = data.draw(st.integers(1, 3))
    dense = data.draw(st.integers(0, layers - 1))
    experts, groups, heads = (data.draw(st.integers(1, 3)) for _ in range(3))
    kind = data.draw(st.sampled_from(["mla", "gqa"]))
    config = config_of(layers, dense, experts, groups, heads, kind)
    num = config.model.moe.num_experts
    order = data.draw(st.permutations(range(num)))
    both = Correspondence((tuple(Origin(expert) for expert in order),) * (layers - dense), (IdRun(0, 0, 30),))
    rules = (*(DeepSeekV2 if kind == "mla" else Llama).rules, HEAD_RULE)
    blocks = [piece for block in all_blocks(rules, config, both) for piece in cut_block(block)]

    shapes = native_shapes(config)
    left = open_regions(shapes, [block.region for block in blocks])  # raises where a row is written twice
    new = {region.key for region in left}
    named = {"embedding.word_embeddings.weight", "output_layer.weight"}
    assert all(key in named or key.startswith("codebook_") or key.endswith("router.weight") for key in new)
    volume = sum(math.prod(region.sizes) for region in [*left, *(block.region for block in blocks)])
    assert volume == sum(math.prod(shape) for shape in shapes.values())

    copies = 1 if kind == "mla" else num + 1  # a dense MLP goes into every expert and the shared one
    rows: dict[str, Counter] = {}
    for block in blocks:
        rows.setdefault(block.name, Counter()).update(range(block.row, block.row + block.rows))
    for name, counts in rows.items():
        layer = int(name.split(".")[2]) if ".layers." in name else -1
        expected = copies if ".mlp." in name and layer >= dense else 1
        assert set(counts) == set(range(len(counts))) and set(counts.values()) == {expected}, name


@given(st.integers(0, 50), st.integers(1, 90), st.integers(1, 40), st.integers(1, 200), st.booleans())
def test_a_cut_keeps_every_row(start, rows, columns, most, has_lead):
    lead = (3,) if has_lead else ()
    region = Region("key", (*lead, start, 0), (*(1 for _ in lead), rows, columns))
    pieces = cut(region, most)
    axis = len(lead)
    assert [row for piece in pieces for row in range(piece.offsets[axis], piece.offsets[axis] + piece.sizes[axis])] == [
        *range(start, start + rows)
    ]
    assert all(math.prod(piece.sizes) <= max(most, columns) for piece in pieces)


def test_two_writers_of_a_row_are_found():
    with pytest.raises(ValueError, match=r"key\[1\]: row 3 is written twice"):
        open_regions({"key": (2, 6, 4)}, [Region("key", (1, 0, 0), (1, 4, 4)), Region("key", (1, 3, 0), (1, 3, 4))])
