"""MoST in plain PyTorch: the decoder, its embeddings and heads, and the loss that training minimizes.

Shape letters: b rows, s new positions, k positions with those of the cache, h hidden size, C codebooks, V ids, K values
of a code, M modalities, t tokens (b * s), E experts, f their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .attention_most import MoSTGroupedQueryAttention, MoSTMultiLatentAttention, MoSTRotaryEmbedding
from .codec_layout_most import NO_CODE
from .configuration_most import MoSTConfig
from .generation_most import SpeechGeneration, text_alone
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

    last_hidden_state: torch.Tensor
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
        # A token's rows are summed in fp32, as training sums them.
        total = torch.zeros_like(hidden, dtype=torch.float32).index_add(0, token, rows.float())
        return total.to(hidden.dtype)


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
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if config.shared_expert_gate else None

    def forward(self, hidden: torch.Tensor, plane: torch.Tensor) -> torch.Tensor:
        """``hidden [b, s, h]`` and ``plane [b, s]``, the modality of each token, M where it is padding."""
        tokens = hidden.flatten(0, 1)
        routed = self.experts(tokens, *self.gate(tokens, plane.flatten())).view_as(hidden)
        if self.shared_experts is None:
            return routed
        shared = self.shared_experts(hidden)
        if self.shared_expert_gate is not None:
            shared = shared * torch.sigmoid(self.shared_expert_gate(hidden))
        return routed + shared


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
        length = input_ids.shape[1]
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
        states = [hidden] if output_hidden_states else []
        for layer in self.layers:
            hidden = layer(
                hidden,
                plane,
                rotations=rotations,
                attention_mask=mask,
                past_key_values=past_key_values,
                **kwargs,
            )
            if output_hidden_states:
                states.append(hidden)
        return MoSTModelOutput(
            last_hidden_state=self.norm(hidden),
            past_key_values=past_key_values,
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def _embed(self, input_ids: torch.Tensor, codes: torch.Tensor | None) -> torch.Tensor:
        hidden = self.embed_tokens(input_ids)
        if codes is None:
            return hidden
        for table, code in zip(self.codebook_embeddings, codes.unbind(-1), strict=False):  # flat layouts have no tables
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


class MoSTForConditionalGeneration(MoSTPreTrainedModel, SpeechGeneration):
    """The decoder with a head for ids and, in the ``frame`` layouts, one for each codebook.

    ``generate`` writes text; ``transcribe``, ``speak`` and ``chat`` read and speak.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # with tie_word_embeddings

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
        if self.config.text_only:
            logits = text_alone(self.config, logits)
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
        of_codebooks = config.codebook_loss_weights or [1.0] * config.num_codebooks
        weights = torch.tensor(of_codebooks, dtype=torch.float32, device=logits.device)
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

    def prepare_inputs_for_generation(self, *args: Any, codes: torch.Tensor | None = None, **kwargs: Any) -> Any:
        # transformers declares self to be of a class that no model is of.
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        length = inputs["input_ids"].shape[1]
        return {**inputs, "codes": None if codes is None else codes[:, -length:]}
