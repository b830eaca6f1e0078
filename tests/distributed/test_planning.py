"""Sizes that planning works out are those of the shards that ranks really build, rank by rank, in every layout."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch.distributed as dist

from megatron_most import parallel
from megatron_most.model import build_model, count_parameters
from megatron_most.planning import memory_of_rank, shard_of_rank
from megatron_most.planning.shards import shard_sizes
from megatron_most.training.optimizer import build_optimizer, wrap_model
from megatron_most.training.parts import find_tables, named_parts
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import tiny_config

TP, PP = "parallel__tensor_model_parallel_size", "parallel__pipeline_model_parallel_size"
EP, ETP = "parallel__expert_model_parallel_size", "parallel__expert_tensor_parallel_size"
CP, VPP = "parallel__context_parallel_size", "parallel__virtual_pipeline_model_parallel_size"
Overrides = dict[str, Any]

LAYOUTS: dict[int, list[Overrides]] = {
    1: [{}],
    2: [{}, {TP: 2}, {TP: 2, ETP: 1}, {EP: 2}, {PP: 2}, {PP: 2, VPP: 2}, {CP: 2}, {ETP: 2}],
    4: [{TP: 2, EP: 2, ETP: 1}, {TP: 2, EP: 2}, {TP: 2, PP: 2}, {PP: 4}, {EP: 4}, {PP: 2, VPP: 2, EP: 2}, {EP: 2}],
    8: [
        {TP: 2, PP: 2, CP: 2, EP: 2},
        {TP: 2, PP: 2, EP: 4, ETP: 1},
        {TP: 2, CP: 2, EP: 2, ETP: 1},
        {PP: 4, EP: 2},
        {TP: 4, EP: 4, ETP: 2},
    ],
}
MODELS: dict[str, Overrides] = {
    "two modalities": {},
    "three modalities": {
        "vocab__further_modalities": "[{name: image, start: 30, stop: 40}]",
        "model__moe__groups": "[{modality: text, size: 5, moe_router_topk: 2},"
        " {modality: audio, size: 1, moe_router_topk: 1},"
        " {modality: image, size: 0, moe_router_topk: 1}]",
        "model__moe__common__size": 2,
        "model__moe__expert_order": "contiguous",
        "model__moe__router_weights": "per_modality",
        "model__moe__moe_shared_expert_gate": True,
        "model__attention__q_lora_rank": 20,
        "model__first_k_dense_replace": 2,  # so that it matters which layers a virtual stage has
        "optimizer__lr_scales": "[{part: experts.text, scale: 0}, {part: embeddings, scale: 0}]",
    },
    "flat": {
        "vocab__layout": "flat",
        "model__attention__type": "gqa",
        "model__attention__num_query_groups": 4,
        "model__attention__kv_channels": 12,
        "model__attention__add_qkv_bias": True,
        "model__attention__qk_layernorm": "all_heads",
        "model__share_embeddings_and_output_weights": True,
        "model__first_k_dense_replace": 0,
        "model__moe__moe_shared_expert_intermediate_size": 0,
        "model__moe__expert_backend": "sequential",
        "precision__dtype": "bf16",
        "optimizer__lr_scales": "[{part: embeddings, scale: 0}, {part: embeddings.audio, scale: 1}]",
    },
}


def differences(cases: list[Overrides]) -> list[str]:
    """What this rank holds otherwise than planned, a line for each; all ``cases`` on the same ranks, one by one."""
    found = []
    for overrides in cases:
        config = tiny_config(**overrides)
        parallel.initialize(config.parallel, seed=1)
        world_size, rank = dist.get_world_size(), dist.get_rank()
        chunks = build_model(config)
        sizes = dict.fromkeys(config.part_names, 0)
        split = {id(table.parameter): table.pieces for table in find_tables(config, chunks)}
        for _, parameter, part in named_parts(config, chunks):
            for piece, elements in split.get(id(parameter), [(part, slice(0, parameter.numel()))]):
                sizes[piece] += elements.stop - elements.start
        planned = shard_of_rank(config, world_size, rank)
        if sizes != planned:
            found.append(f"rank {rank} of {overrides}: {sizes}, planned {planned}")

        optimizer = build_optimizer(config, wrap_model(config, chunks))
        stage = rank // (world_size // config.parallel.pipeline_model_parallel_size)
        expert = rank // config.parallel.expert_tensor_size % config.parallel.expert_model_parallel_size
        estimate = memory_of_rank(config, world_size, stage, expert)
        gradients = sum(
            parameter.numel() for chunk in chunks for parameter in chunk.parameters() if parameter.requires_grad
        )
        width = {"fp32": 4, "bf16": 2}[config.precision.dtype]
        if (estimate.weights, estimate.gradients) != (width * sum(sizes.values()), 4 * gradients):
            found.append(f"rank {rank} of {overrides}: weights {estimate.weights}, gradients {estimate.gradients}")
        # Ranks share the optimizer's state out by the byte, not evenly: all ranks together hold what is planned.
        held = sum(
            parameter.numel()
            for member in optimizer.chained_optimizers
            for group in member.optimizer.param_groups
            for parameter in group["params"]
        )
        held_and_planned = [None] * world_size
        dist.all_gather_object(held_and_planned, (held * (8 if width == 4 else 12), estimate.optimizer))
        held, planned_bytes = (sum(values) for values in zip(*held_and_planned, strict=True))
        if held != pytest.approx(planned_bytes):
            found.append(f"{overrides}: optimizers hold {held} bytes, planned {planned_bytes}")
    return found


QUICK = {(1, "two modalities"), (2, "three modalities"), (4, "flat")}
"""Between them every kind of parallelism and every model; the others are for the slow suite."""


@pytest.mark.parametrize(
    ("world_size", "model"),
    [
        pytest.param(world_size, model, marks=() if (world_size, model) in QUICK else pytest.mark.slow)
        for world_size in LAYOUTS
        for model in MODELS
    ],
)
def test_ranks_hold_what_was_planned(world_size: int, model: str) -> None:
    cases = [{**MODELS[model], "training__global_batch_size": 16, **layout} for layout in LAYOUTS[world_size]]
    assert [line for lines in run_ranks(world_size, differences, cases) for line in lines] == []


@pytest.mark.parametrize("model", MODELS)
def test_shards_add_up_to_the_model(model: str) -> None:
    config = tiny_config(**MODELS[model])
    total = count_parameters(config)["total"]
    assert sum(shard_sizes(config, 0, 0).values()) == total
    split = tiny_config(**MODELS[model], **{PP: 2, EP: 4})
    sizes = [[shard_sizes(split, stage, expert) for expert in range(4)] for stage in range(2)]
    dense = sum(size for stage in sizes for part, size in stage[0].items() if not part.startswith("experts."))
    experts = sum(
        size for stage in sizes for rank in stage for part, size in rank.items() if part.startswith("experts.")
    )
    # A tied embedding has a copy on the last stage, where it is the output head.
    copy = sum(size for part, size in sizes[1][0].items() if part.startswith("embeddings"))
    assert dense + experts - copy == total
    assert bool(copy) == config.model.share_embeddings_and_output_weights


def test_deepseek_v2_lite_is_counted_as_published() -> None:
    """15,706,484,224: with ids 102400 to 102527, which audio needs, and codebooks of 128 codes in and out taken off."""
    config = tiny_config()
    lite = type(config.model)()
    config = dataclasses.replace(config, model=lite, vocab=dataclasses.replace(config.vocab, text_vocab_size=102400))
    ours = 2 * 128 * lite.hidden_size + 2 * 2 * 128 * lite.hidden_size
    assert sum(shard_sizes(config, 0, 0).values()) - ours == 15_706_484_224
