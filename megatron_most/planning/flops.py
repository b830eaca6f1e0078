"""Floating-point operations of a token: what the formulas of the model ask for, not what a kernel executes.

A product of ``[n, a]`` and ``[a, b]`` counts ``2 n a b``; attention counts the causal half of its scores and values.
Norms, activations, softmax and top-k are left out. Training counts three forwards: the backward has two products for
each of the forward's (PaLM, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from megatron_most.config import RunConfig
from megatron_most.model.most_model import padded
from megatron_most.planning.shards import attention_weights, code_rows, router_rows
from megatron_most.vocab import Modality


def modality_shares(config: RunConfig) -> dict[str, float]:
    """Share of each modality in the tokens: ``data.audio_share`` where it is set, the rest even; else all even."""
    names = config.vocab.modality_names
    audio = config.data.audio_share
    if audio is None:
        return dict.fromkeys(names, 1 / len(names))
    rest = (1 - audio) / (len(names) - 1)
    return {name: audio if index == Modality.AUDIO else rest for index, name in enumerate(names)}


def forward_flops(config: RunConfig, modality: str) -> dict[str, float]:
    """FLOPs of one token of ``modality`` through the whole model, by what they are spent on.

    Keys: ``attention`` (projections), ``attention_core`` (rows of one document that fills ``data.seq_length``; packed
    rows need less), ``dense_ffn``, ``routers``, ``shared_experts``, ``experts``, ``heads`` (codebook heads for audio
    alone: only positions with a frame as their label pass them).
    """
    model, moe, attention = config.model, config.model.moe, config.model.attention
    hidden, layers = model.hidden_size, model.num_layers
    moe_layers = layers - model.first_k_dense_replace
    group = next(group for group in moe.groups if group.modality == modality)
    projections = sum(size for part, size, _ in attention_weights(hidden, attention, 1) if part == "attention")
    query_size, value_size = head_sizes(config)
    is_audio = modality == config.vocab.modality_names[Modality.AUDIO]
    return {
        "attention": 2.0 * layers * projections,
        "attention_core": layers
        * attention.num_attention_heads
        * (query_size + value_size)
        * (config.data.seq_length + 1.0),
        "dense_ffn": 2.0 * model.first_k_dense_replace * 3 * hidden * model.ffn_hidden_size,
        "routers": 2.0 * moe_layers * router_rows(config) * hidden,
        "shared_experts": 2.0 * moe_layers * 3 * hidden * moe.moe_shared_expert_intermediate_size,
        "experts": 2.0 * moe_layers * group.moe_router_topk * 3 * hidden * moe.moe_ffn_hidden_size,
        "heads": 2.0 * hidden * (padded(config.vocab.size) + (code_rows(config) if is_audio else 0)),
    }


def train_flops_per_token(config: RunConfig) -> float:
    """Forward and backward of the average token at :func:`modality_shares`; recomputation is not counted."""
    return 3 * sum(share * sum(forward_flops(config, name).values()) for name, share in modality_shares(config).items())


def recomputed_flops_per_token(config: RunConfig) -> float:
    """What ``training.recompute`` adds to :func:`train_flops_per_token`."""
    parts = {"none": (), "moe": ("routers", "shared_experts", "experts")}.get(config.training.recompute)
    total = 0.0
    for name, share in modality_shares(config).items():
        flops = forward_flops(config, name)
        total += share * sum(
            value for part, value in flops.items() if (part != "heads" if parts is None else part in parts)
        )
    return total


def head_sizes(config: RunConfig) -> tuple[int, int]:
    """Sizes of a head's query (or key) and of its value."""
    attention = config.model.attention
    if attention.type == "gqa":
        return attention.kv_channels, attention.kv_channels
    return attention.qk_head_dim + attention.qk_pos_emb_head_dim, attention.v_head_dim
