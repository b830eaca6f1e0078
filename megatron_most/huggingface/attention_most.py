"""Attention and rotary position embedding.

Shape letters: b rows, s new positions, k positions with those of the cache, h hidden size, n query heads, g key-value
heads, d head size of queries and keys, v head size of values.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_most import MoSTConfig


def rotary_frequencies(config: MoSTConfig) -> torch.Tensor:
    """``[d / 2]`` radians per position, from fast to slow, of the rotated part of a head.

    ``yarn``: arXiv 2309.00071, section 3.2. ``llama3``: the rescaling of Llama 3.1.
    """
    rope = config.rope_parameters
    size = config.qk_rope_head_dim if config.attention_type == "mla" else config.head_dim
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    if rope["rope_type"] == "default":
        return frequencies
    factor, original = rope["factor"], rope["original_max_position_embeddings"]
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = ((original * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / factor)

    def place(rotations: float) -> float:
        """Where the frequency stands that turns so often within the original length."""
        return size / 2 * math.log(original / (2 * math.pi * rotations)) / math.log(rope["rope_theta"])

    first = max(math.floor(place(rope["beta_fast"])), 0)
    last = min(math.ceil(place(rope["beta_slow"])), size - 1)
    slowed = ((torch.arange(size // 2) - first) / max(last - first, 1e-3)).clamp(0, 1)
    return frequencies * (1 - slowed + slowed / factor)


def yarn_scales(config: MoSTConfig) -> tuple[float, float]:
    """What YaRN (arXiv 2309.00071, section 3.4) multiplies rotated queries and keys by, and all logits; 1 without it.

    With m(x) = 0.1 x ln(factor) + 1, the first is m(mscale) / m(mscale_all_dim). The second is DeepSeek-V2's
    m(mscale_all_dim) squared, for multi-latent attention alone.
    """
    rope = config.rope_parameters
    if rope["rope_type"] != "yarn" or rope["factor"] <= 1:
        return 1.0, 1.0
    mscale, all_dim = (0.1 * rope[name] * math.log(rope["factor"]) + 1 for name in ("mscale", "mscale_all_dim"))
    return mscale / all_dim, all_dim**2 if config.attention_type == "mla" else 1.0


class MoSTRotaryEmbedding(nn.Module):
    """Cosines and sines of the positions' angles, made once for all layers."""

    def __init__(self, config: MoSTConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = yarn_scales(config)[0]
        self._frequencies: dict[torch.device, torch.Tensor] = {}  # no buffer, as the router's tables are none

    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[b, s]`` -> two of ``[b, 1, s, d / 2]`` fp32."""
        device = position_ids.device
        if device not in self._frequencies:
            self._frequencies[device] = rotary_frequencies(self.config).to(device)
        angles = position_ids[:, None, :, None].float() * self._frequencies[device]
        return angles.cos() * self.scale, angles.sin() * self.scale


def rotate_pairs(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """``[b, n, s, d]``, whose pairs are neighbors -> rotated. In fp32."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def rotate_halves(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """``[b, n, s, d]``, whose pairs are a number and the one d / 2 places on -> rotated. In fp32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1).to(x.dtype)


def _eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **unused: Any,  # what transformers hands to other kinds of attention
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[b, n, s, d]``, ``[b, g, k, d]``, ``[b, g, k, v]`` -> ``[b, s, n, v]`` and weights ``[b, n, s, k]``."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    weights = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class _Attention(nn.Module):
    """What both kinds have in common: attend, project."""

    is_causal = True
    num_key_value_groups: int
    scaling: float
    o_proj: nn.Linear

    def __init__(self, config: MoSTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, _eager_attention)
        out, _ = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.o_proj(out.flatten(2))


class MoSTMultiLatentAttention(_Attention):
    """DeepSeek-V2's attention (arXiv 2405.04434, section 2.1). The cache holds latents and the heads' shared key."""

    num_key_value_groups = 1

    def __init__(self, config: MoSTConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        hidden, heads = config.hidden_size, config.num_attention_heads
        head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        self.scaling = yarn_scales(config)[1] / math.sqrt(head_dim)
        epsilon = config.rms_norm_eps if config.latent_norm_eps is None else config.latent_norm_eps
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, heads * head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
            self.q_a_layernorm = nn.RMSNorm(config.q_lora_rank, eps=epsilon)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(config.kv_lora_rank, eps=epsilon)
        self.kv_b_proj = nn.Linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(heads * config.v_head_dim, hidden, bias=False)

    def forward(
        self,
        hidden: torch.Tensor,
        rotations: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """``[b, s, h]`` -> the same."""
        config, heads = self.config, self.config.num_attention_heads
        query = hidden if config.q_lora_rank is None else self.q_a_layernorm(self.q_a_proj(hidden))
        query = (self.q_proj if config.q_lora_rank is None else self.q_b_proj)(query)
        query = query.unflatten(-1, (heads, -1)).transpose(1, 2)
        query, rotated = query.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        query = torch.cat([query, rotate_pairs(rotated, *rotations)], dim=-1)
        latent, shared = self.kv_a_proj_with_mqa(hidden).split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        latent, shared = self.kv_a_layernorm(latent)[:, None], rotate_pairs(shared[:, None], *rotations)
        if past_key_values is not None:
            latent, shared = past_key_values.update(latent, shared, self.layer_idx)
        keys_and_values = self.kv_b_proj(latent[:, 0]).unflatten(-1, (heads, -1)).transpose(1, 2)
        key, value = keys_and_values.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        key = torch.cat([key, shared.expand(-1, heads, -1, -1)], dim=-1)
        return self._attend(query, key, value, attention_mask, **kwargs)


class MoSTGroupedQueryAttention(_Attention):
    """Llama's attention; with biases Qwen2's, with norms of queries and keys Qwen3's and OLMoE's."""

    def __init__(self, config: MoSTConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        hidden, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.num_key_value_groups = heads // groups
        self.scaling = 1 / math.sqrt(config.head_dim)
        self.q_proj = nn.Linear(hidden, heads * config.head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, groups * config.head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, groups * config.head_dim, bias=config.qkv_bias)
        if config.qk_norm != "none":
            widths = (heads, groups) if config.qk_norm == "all_heads" else (1, 1)
            self.q_norm, self.k_norm = (nn.RMSNorm(n * config.head_dim, eps=config.rms_norm_eps) for n in widths)
        self.o_proj = nn.Linear(heads * config.head_dim, hidden, bias=False)

    def forward(
        self,
        hidden: torch.Tensor,
        rotations: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """``[b, s, h]`` -> the same."""
        query, key, value = self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)
        if self.config.qk_norm == "all_heads":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (x.unflatten(-1, (-1, self.config.head_dim)) for x in (query, key, value))
        if self.config.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        query, key = rotate_halves(query, *rotations), rotate_halves(key, *rotations)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        return self._attend(query, key, value, attention_mask, **kwargs)
