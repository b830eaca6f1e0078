"""Floating-point operations of a token: what the model's formulas ask for, not what a kernel executes.

A product of ``[n, a]`` and ``[a, b]`` counts ``2 n a b``; attention counts its scores and values at the positions that
a query may see. Norms, activations, softmax and top-k are left out. Training counts three forwards: the backward has
two products for each of the forward's (PaLM, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from megatron_most.config import RunConfig
from megatron_most.model.most_model import padded
from megatron_most.planning.rows import RowContents, assumed_contents
from megatron_most.planning.shards import attention_weights, code_rows, router_rows
from megatron_most.vocab import Modality


def forward_flops(config: RunConfig, modality: str, rows: RowContents) -> dict[str, float]:
    """FLOPs of one token of ``modality`` through the whole model, by what they are spent on.

    Keys: ``attention`` (projections), ``attention_core``, ``dense_ffn``, ``routers``, ``shared_experts``, ``experts``,
    ``heads`` (the mean over positions with and without a target; codebook heads belong to audio).
    """
    model, moe, attention = config.model, config.model.moe, config.model.attention
    hidden, layers = model.hidden_size, model.num_layers
    moe_layers = layers - model.first_k_dense_replace
    group = next(group for group in moe.groups if group.modality == modality)
    projections = sum(size for part, size, _ in attention_weights(hidden, attention, 1) if part == "attention")
    query_size, value_size = head_sizes(config)
    logits = rows.targets * padded(config.vocab.size)
    if modality == config.vocab.modality_names[Modality.AUDIO] and rows.frame_targets:
        logits += rows.frame_targets / rows.modalities[modality] * code_rows(config)
    return {
        "attention": 2.0 * layers * projections,
        "attention_core": 2.0 * layers * attention.num_attention_heads * (query_size + value_size) * rows.attended,
        "dense_ffn": 2.0 * model.first_k_dense_replace * 3 * hidden * model.ffn_hidden_size,
        "routers": 2.0 * moe_layers * router_rows(config) * hidden,
        "shared_experts": 2.0 * moe_layers * 3 * hidden * moe.moe_shared_expert_intermediate_size,
        "experts": 2.0 * moe_layers * group.moe_router_topk * 3 * hidden * moe.moe_ffn_hidden_size,
        "heads": 2.0 * hidden * logits,
    }


def mean_forward_flops(config: RunConfig, rows: RowContents) -> dict[str, float]:
    """:func:`forward_flops` of the average token."""
    by_modality = [(share, forward_flops(config, name, rows)) for name, share in rows.modalities.items()]
    return {part: sum(share * flops[part] for share, flops in by_modality) for part in by_modality[0][1]}


def train_flops_per_token(config: RunConfig, rows: RowContents | None = None) -> float:
    """Forward and backward of the average token; recomputation is not counted. Without ``rows``: assumed ones."""
    return 3 * sum(mean_forward_flops(config, rows or assumed_contents(config)).values())


def head_sizes(config: RunConfig) -> tuple[int, int]:
    """Sizes of a head's query (or key) and of its value."""
    attention = config.model.attention
    if attention.type == "gqa":
        return attention.kv_channels, attention.kv_channels
    return attention.qk_head_dim + attention.qk_pos_emb_head_dim, attention.v_head_dim
