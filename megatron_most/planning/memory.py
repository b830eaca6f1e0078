"""Bytes a rank needs: weights, gradients, optimizer state, activations, buffers of the expert layer.

The first three follow from the exact sizes of shards. Activations are what autograd keeps of the portable layers on a
GPU, tensor by tensor, without small ones (masks, positions, statistics of norms). Memory that the allocator loses to
fragmentation, and that of CUDA and NCCL, is not included: :attr:`~megatron_most.planning.gpus.Gpu.usable` leaves room.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_most.config import RunConfig
from megatron_most.model.most_model import padded
from megatron_most.moe import ExpertGroups
from megatron_most.planning.flops import head_sizes
from megatron_most.planning.gpus import DEFAULT_IMBALANCE
from megatron_most.planning.rows import RowContents, assumed_contents
from megatron_most.planning.shards import code_rows, is_moe_layer, learning_sizes, shard_sizes, stage_layers

_PACKED_FILL = 0.75
"""Share of documents in the padded batches that attention makes of a packed row where torch's flash kernel takes none:
lengths lie between a power of 2 and the next."""
_LARGEST_FLASH_HEAD = 256


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank.

    Args:
        activations: kept for the backward pass when most micro-batches are in flight, with the logits and, where layers
            are recomputed, the layer that is being recomputed.
        moe_buffers: of the expert layer that is computing: tokens sent, received, computed and sent back.
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
    config: RunConfig, world_size: int, imbalance: float = DEFAULT_IMBALANCE, rows: RowContents | None = None
) -> dict[tuple[int, int], MemoryEstimate]:
    """The estimate for every (pipeline rank, expert-parallel rank); ranks that share both need the same."""
    parallel = config.parallel
    return {
        (stage, expert): memory_of_rank(config, world_size, stage, expert, imbalance, rows)
        for stage in range(parallel.pipeline_model_parallel_size)
        for expert in range(parallel.expert_model_parallel_size)
    }


def memory_of_rank(
    config: RunConfig,
    world_size: int,
    pipeline_rank: int,
    expert_rank: int,
    imbalance: float = DEFAULT_IMBALANCE,
    rows: RowContents | None = None,
) -> MemoryEstimate:
    """What the ranks at this place of the pipeline and of the expert-parallel group need; ``rows``: else assumed."""
    rows = rows or assumed_contents(config)
    learning = learning_sizes(config, pipeline_rank, expert_rank)
    state = optimizer_state(config, learning)
    expert_state = sum(size for part, size in state.items() if part.startswith("experts."))
    dense_ranks, expert_ranks = _copies(config, world_size) if config.optimizer.use_distributed_optimizer else (1, 1)
    pairs = computed_pairs(config, expert_rank, rows) * imbalance
    return MemoryEstimate(
        weights=sum(shard_sizes(config, pipeline_rank, expert_rank).values()) * element_size(config),
        gradients=4 * sum(learning.values()),
        optimizer=(sum(state.values()) - expert_state) / dense_ranks + expert_state / expert_ranks,
        activations=_activations(config, world_size, pipeline_rank, pairs, rows),
        moe_buffers=_moe_buffers(config, pairs, rows),
    )


def optimizer_state(config: RunConfig, learning: dict[str, int]) -> dict[str, int]:
    """Bytes of the whole optimizer state of parts, of which these numbers of parameters learn.

    AdamW has two fp32 moments, Muon one momentum, and beside bf16 weights stands an fp32 master copy.
    """
    master = 4 if config.precision.dtype == "bf16" else 0
    return {part: size * (master + (4 if config.uses_muon(part) else 8)) for part, size in learning.items()}


def _copies(config: RunConfig, world_size: int) -> tuple[int, int]:
    """Ranks that hold the same dense weights, and the same experts; a distributed optimizer's state is split so."""
    parallel = config.parallel
    dense = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    experts = parallel.expert_tensor_size * parallel.expert_model_parallel_size * parallel.pipeline_model_parallel_size
    return world_size // dense, world_size // experts


def element_size(config: RunConfig) -> int:
    """Bytes of a weight and of an element of an activation."""
    return {"bf16": 2, "fp32": 4}[config.precision.dtype]


def positions_of_group(config: RunConfig) -> float:
    """Positions of a micro-batch on the ranks of a tensor-parallel group."""
    return config.training.micro_batch_size * config.data.seq_length / config.parallel.context_parallel_size


def expert_load(config: RunConfig, rows: RowContents) -> list[float]:
    """(Token, expert) pairs that each expert-parallel rank computes, over the mean of the ranks.

    The experts that a modality may choose are taken to be equally busy: only the mix of modalities counts.
    """
    moe, size = config.model.moe, config.parallel.expert_model_parallel_size
    groups, shares = ExpertGroups.from_config(moe, size), rows.modalities
    per_expert = dict.fromkeys(range(groups.num_experts), 0.0)
    for group, choice in zip(moe.groups, groups.choices, strict=True):
        for expert in choice:
            per_expert[expert] += shares[group.modality] * group.moe_router_topk / len(choice)
    loads = [
        sum(per_expert[expert] for experts in groups.local_experts(rank).values() for expert in experts)
        for rank in range(size)
    ]
    return [load * size / sum(loads) for load in loads]


def sent_pairs(config: RunConfig, rows: RowContents) -> float:
    """(Token, expert) pairs that a rank sends; under sequence parallelism each has its share of the positions."""
    top_k = sum(rows.modalities[group.modality] * group.moe_router_topk for group in config.model.moe.groups)
    return positions_of_group(config) / config.parallel.tensor_model_parallel_size * top_k


def computed_pairs(config: RunConfig, expert_rank: int, rows: RowContents) -> float:
    """Pairs that a rank computes; ranks that split each expert's matrices compute the same ones."""
    return sent_pairs(config, rows) * config.parallel.expert_tensor_size * expert_load(config, rows)[expert_rank]


def layer_activations(config: RunConfig, layer: int, pairs: float) -> tuple[float, float]:
    """Bytes that autograd keeps of one layer: of its attention and both norms, and of its MLP or experts."""
    moe, tensor, width = config.model.moe, config.parallel.tensor_model_parallel_size, element_size(config)
    positions = positions_of_group(config) / tensor
    # A fused SwiGLU keeps gate and up, and their product for the next layer; an eager one also silu(gate) and a copy.
    mlp = (3 if config.precision.dtype == "bf16" else 5) * width
    if not is_moe_layer(config, layer):
        return _attention_activations(config), positions * mlp * config.model.ffn_hidden_size
    # An expert keeps its input as well. Its SwiGLU is compiled in any dtype; moe_act drops the product.
    kept = 2 if config.training.recompute == "moe_act" else 3
    routed = pairs * (config.model.hidden_size + kept * moe.moe_ffn_hidden_size / config.parallel.expert_tensor_size)
    shared = positions * mlp * moe.moe_shared_expert_intermediate_size
    if moe.moe_shared_expert_gate:
        shared += positions * width * config.model.hidden_size
    router = positions * 13 * moe.num_experts  # scores and probs in fp32, logits of the z-loss, the map
    return _attention_activations(config), routed * width + shared + router


def _attention_activations(config: RunConfig) -> float:
    attention, context = config.model.attention, config.parallel.context_parallel_size
    positions, width = positions_of_group(config), element_size(config)
    query, value = head_sizes(config)
    heads = attention.num_attention_heads
    key_heads = attention.num_query_groups if attention.type == "gqa" else heads
    # Split along the sequence: inputs and outputs of both norms, and the compressed queries, keys and values.
    local = 4 * config.model.hidden_size
    split: float
    if attention.type == "mla":
        local += 2 * attention.kv_lora_rank + attention.qk_pos_emb_head_dim + 2 * (attention.q_lora_rank or 0)
    # Split by head: queries and keys before their norms; queries, output, and the keys and values of the whole row.
    normed = (heads + key_heads) * query if attention.type == "gqa" and attention.qk_layernorm != "none" else 0
    if not config.data.packing:
        split = heads * (query + value) + key_heads * (query + value) * context
    elif width == 2 and context == 1 and query <= _LARGEST_FLASH_HEAD:
        # torch's flash kernel takes packed documents with values as large as keys. Its output is cut and copied.
        split = (heads + key_heads) * 2 * query + (heads * value if value < query else 0)
    else:
        batches = (heads * (query + value) + key_heads * (query + value) * context) / _PACKED_FILL
        split = batches + heads * value
    kept = positions / config.parallel.tensor_model_parallel_size * (local + normed + split) * width
    if context > 1:
        kept += positions * config.data.seq_length  # which keys a query may see, a byte each
    return kept


def _activations(config: RunConfig, world_size: int, pipeline_rank: int, pairs: float, rows: RowContents) -> float:
    hidden, width = config.model.hidden_size, element_size(config)
    tensor, pipeline = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    positions = positions_of_group(config) / tensor
    layers = [layer_activations(config, layer, pairs) for layer in stage_layers(config, pipeline_rank)]
    recompute = config.training.recompute
    if recompute == "full":
        kept = len(layers) * positions * hidden * width
        again = max(sum(layer) for layer in layers)
    elif recompute == "moe":
        is_moe = [is_moe_layer(config, layer) for layer in stage_layers(config, pipeline_rank)]
        kept = sum(rest if moe else rest + mlp for (rest, mlp), moe in zip(layers, is_moe, strict=True))
        again = max((mlp for (_, mlp), moe in zip(layers, is_moe, strict=True) if moe), default=0.0)
    else:
        kept, again = sum(sum(layer) for layer in layers), 0.0
    total = kept * micro_batches_under_way(config, world_size, pipeline_rank) + again
    if pipeline_rank == pipeline - 1:
        # Input of the final norm; where there is a target its output, logits in the model's precision and in fp32
        # (which become the softmax), and their gradient.
        logits = rows.targets * padded(config.vocab.size) + rows.frame_targets * code_rows(config)
        taken = (rows.targets + rows.frame_targets) * hidden * tensor  # the heads have the whole sequence
        total += positions * ((hidden + taken) * width + logits * (2 * width + 4))
    return total


def micro_batches_under_way(config: RunConfig, world_size: int, pipeline_rank: int) -> float:
    """Micro-batches whose activations a stage keeps at once; a virtual stage's count as its share of one.

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


def _moe_buffers(config: RunConfig, pairs: float, rows: RowContents) -> float:
    hidden, width = config.model.hidden_size, element_size(config)
    if config.model.moe.moe_token_dispatcher_type == "allgather":
        # Every rank receives all tokens of the group, and their results are added up in a buffer of the same size.
        ranks = config.parallel.expert_model_parallel_size * config.parallel.expert_tensor_size
        tokens = positions_of_group(config) / config.parallel.tensor_model_parallel_size * ranks
        return (2 * tokens + 2 * pairs) * hidden * width
    return (2 * sent_pairs(config, rows) + 2 * pairs) * hidden * width
