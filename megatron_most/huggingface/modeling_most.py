"""MoST in plain PyTorch: the decoder, its embeddings and heads, and the loss that training minimizes.

Shape letters: b rows, s new positions, k positions with those of the cache, h hidden size, n query heads, g key-value
heads, d head size, C codebooks, V ids, K values of a code, M modalities, t tokens (b * s), E experts, f their width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput

from .codec_layout_most import NO_CODE
from .configuration_most import MoSTConfig
from .generation_most import SpeechGenerationMixin
from .routing_most import MoSTRouter

# Files have a tensor for each expert and projection, the model one for all experts of a layer.
register_checkpoint_conversion_mapping(
    MoSTConfig.model_type,
    [
        WeightConverter(
            source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            target_patterns="mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns="mlp.experts.*.down_proj.weight",
            target_patterns="mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ],
    overwrite=True,
)


@dataclass
class MoSTModelOutput(ModelOutput):
    """What :class:`MoSTModel` returns. ``hidden_states`` are the embeddings and each layer's output, if asked for."""

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class MoSTOutput(ModelOutput):
    """What :class:`MoSTForConditionalGeneration` returns.

    loss: mean over the targets; None without labels.
    logits: ``[b, s, V]``.
    code_logits: ``[b, s, C, K]``, of the codes beside the next id; None in the ``flat`` layouts.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    code_logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


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
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, heads * head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
            self.q_a_layernorm = nn.RMSNorm(config.q_lora_rank, eps=config.rms_norm_eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(config.kv_lora_rank, eps=config.rms_norm_eps)
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
    """Llama's attention."""

    def __init__(self, config: MoSTConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        hidden, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.num_key_value_groups = heads // groups
        self.scaling = 1 / math.sqrt(config.head_dim)
        self.q_proj = nn.Linear(hidden, heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, groups * config.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, groups * config.head_dim, bias=False)
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
        query, key, value = (
            projection(hidden).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate_halves(query, *rotations), rotate_halves(key, *rotations)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        return self._attend(query, key, value, attention_mask, **kwargs)


class MoSTMLP(nn.Module):
    """A SwiGLU network (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class MoSTExperts(nn.Module):
    """The routed experts of a layer: ``gate_up_proj [E, 2f, h]``, gate above up, and ``down_proj [E, h, f]``."""

    def __init__(self, config: MoSTConfig) -> None:
        super().__init__()
        num_experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, width))

    def forward(self, hidden: torch.Tensor, experts: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """``hidden [t, h]``, experts and gates ``[t, top_k]`` (a gate of 0 sends nothing) -> their sum ``[t, h]``."""
        token, place = gates.nonzero(as_tuple=True)
        expert, order = experts[token, place].sort(stable=True)
        token, place = token[order], place[order]
        counts = torch.bincount(expert, minlength=len(self.down_proj))
        rows = _grouped_linear(hidden[token], self.gate_up_proj, counts)
        gate, up = rows.chunk(2, dim=-1)
        rows = (F.silu(gate) * up * gates[token, place, None]).to(hidden.dtype)
        rows = _grouped_linear(rows, self.down_proj, counts)
        return torch.zeros_like(hidden).index_add(0, token, rows)


def _grouped_linear(rows: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Rows sorted by expert times their expert's matrix ``weight [E, out, in]``; ``counts [E]`` rows of each."""
    if _has_grouped_mm(weight):
        ends = counts.cumsum(0).to(torch.int32)
        return F.grouped_mm(rows.to(weight.dtype), weight.transpose(1, 2), offs=ends)
    pieces = zip(rows.split(counts.tolist()), weight, strict=True)
    return torch.cat([F.linear(piece, matrix) for piece, matrix in pieces])


def _has_grouped_mm(weight: torch.Tensor) -> bool:
    """torch's kernel: since 2.10, on CPUs and on GPUs of compute capability 8.0, for rows of whole 16 bytes."""
    if not hasattr(F, "grouped_mm") or any(size * weight.itemsize % 16 for size in weight.shape[1:]):
        return False
    if weight.is_cuda:
        return torch.cuda.get_device_capability(weight.device) >= (8, 0)
    return weight.device.type == "cpu" and weight.data_ptr() % 16 == 0


class MoSTSparseMoE(nn.Module):
    """Routed experts of the token's modality, and shared experts that see every token."""

    def __init__(self, config: MoSTConfig) -> None:
        super().__init__()
        self.gate = MoSTRouter(config)
        self.experts = MoSTExperts(config)
        width = config.shared_expert_intermediate_size
        self.shared_experts = MoSTMLP(config.hidden_size, width) if width else None

    def forward(self, hidden: torch.Tensor, plane: torch.Tensor) -> torch.Tensor:
        """``hidden [b, s, h]`` and ``plane [b, s]``, the modality of each token, M where it is padding."""
        tokens = hidden.flatten(0, 1)
        routed = self.experts(tokens, *self.gate(tokens, plane.flatten())).view_as(hidden)
        return routed if self.shared_experts is None else routed + self.shared_experts(hidden)


class MoSTDecoderLayer(GradientCheckpointingLayer):
    """Attention, then experts, or one MLP in the first layers; each after a norm and beside a residual."""

    def __init__(self, config: MoSTConfig, layer_idx: int) -> None:
        super().__init__()
        attention = MoSTMultiLatentAttention if config.attention_type == "mla" else MoSTGroupedQueryAttention
        self.is_dense = layer_idx < config.first_k_dense_replace
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = attention(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MoSTMLP(config.hidden_size, config.intermediate_size) if self.is_dense else MoSTSparseMoE(config)

    def forward(self, hidden: torch.Tensor, plane: torch.Tensor, **attention: Any) -> torch.Tensor:
        """``attention``: what the attention takes beside the hidden states."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), **attention)
        normed = self.post_attention_layernorm(hidden)
        return hidden + (self.mlp(normed) if self.is_dense else self.mlp(normed, plane))


class MoSTPreTrainedModel(PreTrainedModel):
    """What transformers asks of the models."""

    config: MoSTConfig
    config_class = MoSTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoSTDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, MoSTRouter):
            nn.init.normal_(module.weight, std=std)
            if self.config.use_expert_bias:
                nn.init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, MoSTExperts):
            nn.init.normal_(module.gate_up_proj, std=std)
            nn.init.normal_(module.down_proj, std=std)


class MoSTModel(MoSTPreTrainedModel):
    """Embeddings and layers. In the ``frame`` layouts the embeddings of a position's codes are added to its id's."""

    def __init__(self, config: MoSTConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        num_tables = config.num_codebooks if config.uses_side_codes else 0
        self.codebook_embeddings = nn.ModuleList(
            nn.Embedding(config.codebook_vocab_size, config.hidden_size) for _ in range(num_tables)
        )
        self.layers = nn.ModuleList(MoSTDecoderLayer(config, place) for place in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MoSTRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        codes: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> MoSTModelOutput:
        """Run the decoder.

        Args:
            input_ids: ``[b, s]``.
            codes: ``[b, s, C]``, ``NO_CODE`` (-1) where a position has none or it is hidden (``frame`` layouts only);
                None: no position has any.
            attention_mask: ``[b, k]``, 0 at padding, which no position attends to and no expert sees.
            position_ids: ``[b, s]``; by default the number of positions before that are no padding.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        batch_size, length = input_ids.shape
        hidden = self._embed(input_ids, codes)
        is_padding = None
        if attention_mask is not None and attention_mask.ndim == 2:
            is_padding = attention_mask[:, -length:] == 0
        if position_ids is None:
            position_ids = self._positions(input_ids, attention_mask, past_key_values)
        plane = self.config.modality_of(input_ids)
        if is_padding is not None:
            plane = plane.masked_fill(is_padding, len(self.config.expert_groups))
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotations = self.rotary_emb(position_ids)
        states = [hidden]
        for layer in self.layers:
            hidden = layer(
                hidden,
                plane,
                rotations=rotations,
                attention_mask=mask,
                past_key_values=past_key_values,
                **kwargs,
            )
            states.append(hidden)
        return MoSTModelOutput(
            last_hidden_state=self.norm(hidden),
            past_key_values=past_key_values,
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def _embed(self, input_ids: torch.Tensor, codes: torch.Tensor | None) -> torch.Tensor:
        hidden = self.embed_tokens(input_ids)
        for codebook, table in enumerate(self.codebook_embeddings if codes is not None else ()):
            code = codes[..., codebook]
            hidden = hidden + table(code.clamp(min=0)) * (code != NO_CODE)[..., None]
        return hidden

    def _positions(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values: Cache | None
    ) -> torch.Tensor:
        length = input_ids.shape[1]
        if attention_mask is not None and attention_mask.ndim == 2:
            return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -length:]
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        return torch.arange(past, past + length, device=input_ids.device).expand(input_ids.shape)


class MoSTForConditionalGeneration(MoSTPreTrainedModel, SpeechGenerationMixin, GenerationMixin):
    """The decoder with a head for ids and, in the ``frame`` layouts, one for each codebook.

    ``generate`` writes text; ``transcribe``, ``speak`` and ``chat`` read and speak.
    """

    def __init__(self, config: MoSTConfig) -> None:
        super().__init__(config)
        self.model = MoSTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        num_heads = config.num_codebooks if config.uses_side_codes else 0
        self.codebook_heads = nn.ModuleList(
            nn.Linear(config.hidden_size, config.codebook_vocab_size, bias=False) for _ in range(num_heads)
        )
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        codes: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        code_labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> MoSTOutput:
        """Logits of what follows each position, and the loss.

        Args:
            input_ids, codes, attention_mask: see :meth:`MoSTModel.forward`.
            labels: ``[b, s]``, the ids themselves (they are shifted here), -100 where there is no target.
            code_labels: ``[b, s, C]``, the codes of those positions, where ``codes`` hides some of them.
            logits_to_keep: of how many last positions, or of which ones, logits are made; 0 for all.
            num_items_in_batch: targets over which the loss is a mean, if not those of ``labels`` alone.
        """
        outputs = self.model(input_ids, codes=codes, attention_mask=attention_mask, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = outputs.last_hidden_state[:, kept]
        logits, code_logits = self.lm_head(hidden), None
        if self.codebook_heads:
            code_logits = torch.stack([head(hidden) for head in self.codebook_heads], dim=-2)
        loss = None
        if labels is not None:
            code_labels = codes if code_labels is None else code_labels
            loss = self._loss(logits, code_logits, labels, code_labels, num_items_in_batch)
        return MoSTOutput(
            loss=loss,
            logits=logits,
            code_logits=code_logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _loss(
        self,
        logits: torch.Tensor,
        code_logits: torch.Tensor | None,
        labels: torch.Tensor,
        code_labels: torch.Tensor | None,
        num_targets: int | torch.Tensor | None,
    ) -> torch.Tensor:
        """The mean over targets of their cross entropy, weighted as in training.

        A frame adds the weighted losses of its codes; a code that is an id is weighted itself; text has its own weight.
        """
        config = self.config
        is_target = labels[:, 1:] != -100
        labels = labels[:, 1:][is_target]
        losses = F.cross_entropy(logits[:, :-1][is_target].float(), labels, reduction="none")
        weights = torch.tensor(config.codebook_loss_weights or [1.0] * config.num_codebooks, device=logits.device)
        if code_logits is None:
            codebook = torch.div(labels - config.frame_id - 1, config.codebook_size, rounding_mode="floor")
            is_code = (codebook >= 0) & (codebook < config.num_codebooks)
            losses = losses * weights[codebook.where(is_code, 0)].where(is_code, 1.0)
        elif code_labels is not None:
            targets = code_labels[:, 1:][is_target]
            predictions = code_logits[:, :-1][is_target].float().flatten(0, 1)
            of_codes = F.cross_entropy(predictions, targets.flatten(), ignore_index=NO_CODE, reduction="none")
            losses = losses + of_codes.view_as(targets) @ weights
        is_text = config.modality_of(labels) == 0
        losses = losses * torch.where(is_text, config.text_loss_weight, 1.0)
        return losses.sum() / (is_target.sum() if num_targets is None else num_targets)

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if model_kwargs.get("codes") is not None:  # text has none
            codes = model_kwargs["codes"]
            model_kwargs["codes"] = F.pad(codes, (0, 0, 0, 1), value=NO_CODE)
        return model_kwargs

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, codes: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        length = inputs["input_ids"].shape[1]
        return {**inputs, "codes": None if codes is None else codes[:, -length:]}
