"""Bytes a rank needs: weights, gradients, optimizer state, activations, buffers of the expert layer.

The first three follow from the exact sizes of shards. Activations are what autograd keeps of the portable layers on a
GPU, tensor by tensor; small ones (masks, positions, statistics of norms) are left out. Not counted: what the allocator
loses to fragments, and what CUDA and NCCL take; plan with room for both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from megatron_most.config import RunConfig
from megatron_most.model.most_model import padded
from megatron_most.moe import ExpertGroups
from megatron_most.planning.flops import head_sizes, modality_shares
from megatron_most.planning.gpus import DEFAULT_IMBALANCE
from megatron_most.planning.shards import code_rows, is_moe_layer, shard_sizes, stage_layers

_PACKED_FILL = 0.75
"""Share of packed documents in the batches attention makes of them: lengths lie between a power of 2 and the next."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank.

    Args:
        activations: kept for the backward pass, at the moment when most micro-batches are under way; with the logits
            and, where layers are recomputed, the one layer that is being recomputed.
        moe_buffers: of one expert layer at work: tokens sent, received, computed and sent back.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    moe_buffers: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def memory_per_rank(
    config: RunConfig, world_size: int, imbalance: float = DEFAULT_IMBALANCE
) -> dict[tuple[int, int], MemoryEstimate]:
    """The estimate for every (pipeline rank, expert-parallel rank); other ranks need what these do."""
    parallel = config.parallel
    return {
        (stage, expert): memory_of_rank(config, world_size, stage, expert, imbalance)
        for stage in range(parallel.pipeline_model_parallel_size)
        for expert in range(parallel.expert_model_parallel_size)
    }


def memory_of_rank(
    config: RunConfig, world_size: int, pipeline_rank: int, expert_rank: int, imbalance: float = DEFAULT_IMBALANCE
) -> MemoryEstimate:
    """What the ranks at these places of the pipeline and of the expert-parallel group need."""
    sizes = shard_sizes(config, pipeline_rank, expert_rank)
    learning = {part: size for part, size in sizes.items() if config.lr_scale(part) > 0}
    # AdamW's two moments or Muon's momentum, and beside bf16 weights a master copy, in fp32.
    master = 4 if config.precision.dtype == "bf16" else 0
    state = {part: size * (master + (4 if config.uses_muon(part) else 8)) for part, size in learning.items()}
    expert_state = sum(size for part, size in state.items() if part.startswith("experts."))
    dense_ranks, expert_ranks = _copies(config, world_size) if config.optimizer.use_distributed_optimizer else (1, 1)
    pairs = computed_pairs(config, expert_rank) * imbalance
    return MemoryEstimate(
        weights=sum(sizes.values()) * _width(config),
        gradients=sum(learning.values()) * 4,
        optimizer=(sum(state.values()) - expert_state) / dense_ranks + expert_state / expert_ranks,
        activations=_activations(config, world_size, pipeline_rank, pairs),
        moe_buffers=_moe_buffers(config, pairs),
    )


def _copies(config: RunConfig, world_size: int) -> tuple[int, int]:
    """Ranks that hold the same dense weights, and the same experts; the distributed optimizer splits its state so."""
    parallel = config.parallel
    dense = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    experts = parallel.expert_tensor_size * parallel.expert_model_parallel_size * parallel.pipeline_model_parallel_size
    return world_size // dense, world_size // experts


def _width(config: RunConfig) -> int:
    """Bytes of a weight and of an element of an activation."""
    return {"bf16": 2, "fp32": 4}[config.precision.dtype]


def _positions(config: RunConfig) -> float:
    """Of a micro-batch on the ranks of a tensor-parallel group."""
    return config.training.micro_batch_size * config.data.seq_length / config.parallel.context_parallel_size


def expert_load(config: RunConfig) -> list[float]:
    """Of each expert-parallel rank, the share of all (token, expert) pairs that it computes, x ranks; 1 is the mean.

    Inside a modality's choice experts are taken to be equally busy, so this is the mix of modalities alone.
    """
    moe, size = config.model.moe, config.parallel.expert_model_parallel_size
    groups, shares = ExpertGroups.from_config(moe, size), modality_shares(config)
    per_expert = dict.fromkeys(range(groups.num_experts), 0.0)
    for group, choice in zip(moe.groups, groups.choices, strict=True):
        for expert in choice:
            per_expert[expert] += shares[group.modality] * group.moe_router_topk / len(choice)
    loads = [
        sum(per_expert[expert] for experts in groups.local_experts(rank).values() for expert in experts)
        for rank in range(size)
    ]
    return [load * size / sum(loads) for load in loads]


def _sent(config: RunConfig) -> float:
    """(token, expert) pairs that a rank sends: under sequence parallelism each has its share of the positions."""
    shares = modality_shares(config)
    top_k = sum(shares[group.modality] * group.moe_router_topk for group in config.model.moe.groups)
    return _positions(config) / config.parallel.tensor_model_parallel_size * top_k


def computed_pairs(config: RunConfig, expert_rank: int) -> float:
    """Pairs that a rank computes; ranks that split each expert's matrices compute the same ones."""
    return _sent(config) * config.parallel.expert_tensor_size * expert_load(config)[expert_rank]


def layer_activations(config: RunConfig, layer: int, pairs: float) -> tuple[float, float]:
    """Bytes that autograd keeps of one layer: of its attention and both norms, and of its MLP or experts."""
    model, moe, attention, parallel = config.model, config.model.moe, config.model.attention, config.parallel
    tensor, context, width = parallel.tensor_model_parallel_size, parallel.context_parallel_size, _width(config)
    positions, hidden = _positions(config), model.hidden_size
    query, value = head_sizes(config)
    key_heads = attention.num_query_groups if attention.type == "gqa" else attention.num_attention_heads
    # Split along the sequence: inputs and outputs of both norms, and the compressed queries, keys and values.
    local = 4 * hidden
    if attention.type == "mla":
        local += 2 * attention.kv_lora_rank + attention.qk_pos_emb_head_dim + 2 * (attention.q_lora_rank or 0)
    # Split by head: queries, keys and values of the whole row, what attention returns.
    heads = attention.num_attention_heads * (query + value) + key_heads * (query + value) * context
    if config.data.packing:
        heads = heads / _PACKED_FILL + attention.num_attention_heads * value
    kept = positions / tensor * (local + heads) * width
    if context > 1:
        kept += positions * config.data.seq_length  # which keys a query may see, a byte each
    if not is_moe_layer(config, layer):
        return kept, positions / tensor * 5 * model.ffn_hidden_size * width
    # An MLP keeps gate and up, silu(gate), up, their product; an expert its input as well.
    expert_width = moe.moe_ffn_hidden_size / parallel.expert_tensor_size
    routed = pairs * (hidden + 5 * expert_width) * width
    shared = positions / tensor * 5 * moe.moe_shared_expert_intermediate_size * width
    router = positions / tensor * 13 * moe.num_experts  # scores and probs in fp32, logits of the z-loss, the map
    return kept, routed + shared + router


def _activations(config: RunConfig, world_size: int, pipeline_rank: int, pairs: float) -> float:
    hidden, width = config.model.hidden_size, _width(config)
    tensor, pipeline = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    layers = [layer_activations(config, layer, pairs) for layer in stage_layers(config, pipeline_rank)]
    recompute = config.training.recompute
    if recompute == "full":
        kept = len(layers) * _positions(config) / tensor * hidden * width
        again = max(sum(layer) for layer in layers)
    elif recompute == "moe":
        is_moe = [is_moe_layer(config, layer) for layer in stage_layers(config, pipeline_rank)]
        kept = sum(rest if moe else rest + mlp for (rest, mlp), moe in zip(layers, is_moe, strict=True))
        again = max((mlp for (_, mlp), moe in zip(layers, is_moe, strict=True) if moe), default=0.0)
    else:
        kept, again = sum(sum(layer) for layer in layers), 0.0
    total = kept * micro_batches_under_way(config, world_size, pipeline_rank) + again
    if pipeline_rank == pipeline - 1:
        # Final norm, logits in the model's precision and in fp32 (which become the softmax), and their gradient;
        # at worst every position has codes.
        rows = padded(config.vocab.size) + code_rows(config)
        total += _positions(config) / tensor * (2 * hidden * width + rows * (2 * width + 4))
    return total


def micro_batches_under_way(config: RunConfig, world_size: int, pipeline_rank: int) -> float:
    """Micro-batches of which a stage keeps activations at once, a chunk of virtual stages counting as its share of one.

    Megatron's schedules: one forward, one backward, after a warm-up that is longer the further a stage is from the
    last (arXiv 2104.04473, section 2.2).
    """
    parallel = config.parallel
    pipeline, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    count = config.num_microbatches(parallel.data_parallel_size(world_size))
    if virtual == 1:
        return min(count, pipeline - pipeline_rank)
    warm_up = 2 * (pipeline - pipeline_rank - 1) + (virtual - 1) * pipeline
    return min(count * virtual, warm_up + 1) / virtual


def _moe_buffers(config: RunConfig, pairs: float) -> float:
    hidden, width = config.model.hidden_size, _width(config)
    if config.model.moe.moe_token_dispatcher_type == "allgather":
        # Every rank is given all tokens of the group; the results of all are added up in a buffer of the same size.
        ranks = config.parallel.expert_model_parallel_size * config.parallel.expert_tensor_size
        tokens = _positions(config) / config.parallel.tensor_model_parallel_size * ranks
        return (2 * tokens + 2 * pairs) * hidden * width
    return math.fsum((2 * _sent(config), 2 * pairs)) * hidden * width
