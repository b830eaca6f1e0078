"""How many parameters each rank holds, part by part: exact for every layout.

Parts are those of :attr:`megatron_most.config.RunConfig.part_names`. What a rank holds depends on its pipeline rank
(its layers; the embeddings on the first stage, the heads on the last) and on its expert-parallel rank (experts of each
pool). Ranks that share both hold equal sizes.

Letters: E experts, M modalities, V ids (padded), C codebooks, K codes (padded).
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_most.config import RunConfig
from megatron_most.config.attention import AttentionConfig
from megatron_most.model.most_model import padded
from megatron_most.moe import ExpertGroups


def stage_layers(config: RunConfig, pipeline_rank: int) -> list[int]:
    """Layers, counted from 0, of a pipeline rank: a slice of the model for each of its virtual stages."""
    parallel = config.parallel
    pipeline, stages = parallel.pipeline_model_parallel_size, parallel.num_stages
    size = config.model.num_layers // stages
    return [
        layer for stage in range(pipeline_rank, stages, pipeline) for layer in range(stage * size, (stage + 1) * size)
    ]


def is_moe_layer(config: RunConfig, layer: int) -> bool:
    return layer >= config.model.first_k_dense_replace


def shard_sizes(config: RunConfig, pipeline_rank: int, expert_rank: int) -> dict[str, int]:
    """Parameters of each part on the ranks at this place of the pipeline and of the expert-parallel group."""
    parallel = config.parallel
    sizes = dict.fromkeys(config.part_names, 0)
    groups = ExpertGroups.from_config(config.model.moe, parallel.expert_model_parallel_size)
    pools = {pool: len(experts) for pool, experts in groups.local_experts(expert_rank).items()}
    weights = [weight for layer in stage_layers(config, pipeline_rank) for weight in _layer(config, layer, pools)]
    if pipeline_rank == 0:
        weights.append(
            ("embeddings", config.model.hidden_size * _table_rows(config), parallel.tensor_model_parallel_size)
        )
    if pipeline_rank == parallel.pipeline_model_parallel_size - 1:
        weights.append(("heads", config.model.hidden_size * _table_rows(config), parallel.tensor_model_parallel_size))
        weights.append(("norms", config.model.hidden_size, 1))
    for part, size, split in weights:
        sizes[part] += size // split
    return sizes


def shard_of_rank(config: RunConfig, world_size: int, rank: int) -> dict[str, int]:
    """:func:`shard_sizes` of a global rank, in Megatron's order of ranks: tensor fastest, pipeline slowest."""
    parallel = config.parallel
    pipeline_rank = rank // (world_size // parallel.pipeline_model_parallel_size)
    expert_rank = rank // parallel.expert_tensor_size % parallel.expert_model_parallel_size
    return shard_sizes(config, pipeline_rank, expert_rank)


def _layer(config: RunConfig, layer: int, pools: dict[str, int]) -> Iterator[tuple[str, int, int]]:
    """(part, parameters of the whole layer or of the rank's experts, ranks they are split over).

    pools: experts of each pool on the rank.
    """
    model, moe, parallel = config.model, config.model.moe, config.parallel
    hidden, tensor = model.hidden_size, parallel.tensor_model_parallel_size
    yield from attention_weights(hidden, model.attention, tensor)
    yield "norms", 2 * hidden, 1
    if not is_moe_layer(config, layer):
        yield "dense_ffn", 3 * hidden * model.ffn_hidden_size, tensor
        return
    yield "routers", router_rows(config) * hidden, 1
    if moe.moe_shared_expert_intermediate_size:
        yield "shared_experts", 3 * hidden * moe.moe_shared_expert_intermediate_size, tensor
    for pool, count in pools.items():
        yield f"experts.{pool}", count * 3 * hidden * moe.moe_ffn_hidden_size, parallel.expert_tensor_size


def attention_weights(hidden: int, attention: AttentionConfig, tensor: int) -> Iterator[tuple[str, int, int]]:
    """(part, parameters, ranks they are split over) of one layer's attention; down projections are replicated."""
    heads = attention.num_attention_heads
    if attention.type == "gqa":
        yield "attention", 2 * hidden * (heads + attention.num_query_groups) * attention.kv_channels, tensor
        return
    head_dim = attention.qk_head_dim + attention.qk_pos_emb_head_dim
    if attention.q_lora_rank is None:
        yield "attention", hidden * heads * head_dim, tensor
    else:
        yield "attention", hidden * attention.q_lora_rank, 1
        yield "norms", attention.q_lora_rank, 1
        yield "attention", attention.q_lora_rank * heads * head_dim, tensor
    yield "attention", hidden * (attention.kv_lora_rank + attention.qk_pos_emb_head_dim), 1
    yield "norms", attention.kv_lora_rank, 1
    yield "attention", attention.kv_lora_rank * heads * (attention.qk_head_dim + attention.v_head_dim), tensor
    yield "attention", heads * attention.v_head_dim * hidden, tensor


def router_rows(config: RunConfig) -> int:
    """E, or M x E with a router for each modality."""
    moe = config.model.moe
    return moe.num_experts * (len(moe.groups) if moe.router_weights == "per_modality" else 1)


def code_rows(config: RunConfig) -> int:
    """Rows of all codebook tables: C x K, 0 where codes are ids."""
    vocab = config.vocab
    return vocab.num_codebooks * padded(vocab.codebook_size) if vocab.codec_layout.uses_side_codes else 0


def _table_rows(config: RunConfig) -> int:
    """V and the codebooks' rows, of the embeddings as of the heads."""
    return padded(config.vocab.size) + code_rows(config)
