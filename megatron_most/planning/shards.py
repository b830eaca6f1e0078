"""How many parameters each rank holds, part by part: exact for every layout.

Parts are those of :attr:`megatron_most.config.RunConfig.part_names`. What a rank holds depends on its pipeline rank
(its layers; the embeddings on the first stage, the heads on the last), on its expert-parallel rank (experts of each
pool) and on its tensor-parallel rank (which ids). Ranks that share all three hold equal sizes. Those that share the
first two hold as much in total: only how much of it is text's or audio's may differ.

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


def shard_sizes(config: RunConfig, pipeline_rank: int, expert_rank: int, tensor_rank: int = 0) -> dict[str, int]:
    """Parameters of each part on the ranks at this place of the pipeline, expert- and tensor-parallel groups."""
    sizes = dict.fromkeys(config.part_names, 0)
    for parameter in _parameters(config, pipeline_rank, expert_rank, tensor_rank):
        for part, size in parameter.items():
            sizes[part] += size
    return sizes


def learning_sizes(config: RunConfig, pipeline_rank: int, expert_rank: int) -> dict[str, int]:
    """Those of :func:`shard_sizes` with gradients and optimizer state: frozen rows of a table that learns have both."""
    sizes = dict.fromkeys(config.part_names, 0)
    for parameter in _parameters(config, pipeline_rank, expert_rank, tensor_rank=0):
        if any(config.lr_scale(part) > 0 for part in parameter):
            for part, size in parameter.items():
                sizes[part] += size
    return sizes


def shard_of_rank(config: RunConfig, world_size: int, rank: int) -> dict[str, int]:
    """:func:`shard_sizes` of a global rank, in Megatron's order of ranks: tensor fastest, pipeline slowest."""
    parallel = config.parallel
    pipeline_rank = rank // (world_size // parallel.pipeline_model_parallel_size)
    expert_rank = rank // parallel.expert_tensor_size % parallel.expert_model_parallel_size
    return shard_sizes(config, pipeline_rank, expert_rank, rank % parallel.tensor_model_parallel_size)


def _parameters(config: RunConfig, pipeline_rank: int, expert_rank: int, tensor_rank: int) -> Iterator[dict[str, int]]:
    """Part -> elements on the rank, for one or more parameters at a time that have the same parts."""
    parallel, hidden = config.parallel, config.model.hidden_size
    groups = ExpertGroups.from_config(config.model.moe, parallel.expert_model_parallel_size)
    pools = {pool: len(experts) for pool, experts in groups.local_experts(expert_rank).items()}
    for layer in stage_layers(config, pipeline_rank):
        for part, size, split in _layer(config, layer, pools):
            yield {part: size // split}
    is_last = pipeline_rank == parallel.pipeline_model_parallel_size - 1
    if is_last:
        yield {"norms": hidden}
    is_tied = config.model.share_embeddings_and_output_weights
    codes = hidden * code_rows(config) // parallel.tensor_model_parallel_size
    if pipeline_rank == 0:
        yield _table(config, "embeddings", tensor_rank)
        yield {"embeddings.audio": codes}
    if is_last and not is_tied:
        yield _table(config, "heads", tensor_rank)
    elif is_last and pipeline_rank > 0:  # a copy of the table that the first stage holds, too
        yield _table(config, "embeddings", tensor_rank)
    if is_last and codes:
        yield {"heads.audio": codes}


def _table(config: RunConfig, part: str, tensor_rank: int) -> dict[str, int]:
    """The embedding or the head of all ids: rows of text ids come first, those of audio ids and padding after them."""
    hidden = config.model.hidden_size
    rows = padded(config.vocab.size) // config.parallel.tensor_model_parallel_size
    text = min(max(config.vocab.text_vocab_size - tensor_rank * rows, 0), rows)
    return {part: hidden * text, f"{part}.audio": hidden * (rows - text)}


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
        if moe.moe_shared_expert_gate:
            yield "shared_experts", hidden, 1
    for pool, count in pools.items():
        yield f"experts.{pool}", count * 3 * hidden * moe.moe_ffn_hidden_size, parallel.expert_tensor_size


def attention_weights(hidden: int, attention: AttentionConfig, tensor: int) -> Iterator[tuple[str, int, int]]:
    """(part, parameters, ranks they are split over) of one layer's attention; down projections are replicated."""
    heads = attention.num_attention_heads
    if attention.type == "gqa":
        keys, size = attention.num_query_groups, attention.kv_channels
        yield "attention", 2 * hidden * (heads + keys) * size, tensor
        if attention.add_qkv_bias:
            yield "attention", (heads + 2 * keys) * size, tensor
        if attention.qk_layernorm == "head":
            yield "norms", 2 * size, 1
        elif attention.qk_layernorm == "all_heads":
            yield "norms", (heads + keys) * size, tensor
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
