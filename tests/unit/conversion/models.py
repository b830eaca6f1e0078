"""Tiny random models in Hugging Face folders, written by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, LlamaConfig, LlamaForCausalLM

VOCAB = 90  # no multiple of anything
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 3.0,
    "beta_slow": 0.5,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "original_max_position_embeddings": 24,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}

DEEPSEEK_SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "q_lora": {"q_lora_rank": 12, "rope_parameters": YARN},
    "group_limited": {
        "topk_method": "group_limited_greedy",
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 16.0,
    },
    "three_dense": {"num_hidden_layers": 5, "first_k_dense_replace": 3},
    "odd_experts": {"n_routed_experts": 7, "n_shared_experts": 1, "first_k_dense_replace": 0},
}


def randomized(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights large enough for every part to matter; norms differ from one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2 + ("norm" in name))
    return model.eval()


def deepseek(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 1, **options: Any) -> DeepseekV2ForCausalLM:
    """Write a DeepSeek-V2 of a few layers to ``folder``."""
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "first_k_dense_replace": 1,
        "n_routed_experts": 6,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 12,
        "max_position_embeddings": 64,
    }
    model = randomized(DeepseekV2ForCausalLM(DeepseekV2Config(**{**values, **options})), seed).to(dtype)
    model.save_pretrained(folder)
    return model


def llama(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 2, **options: Any) -> LlamaForCausalLM:
    """Write a Llama of a few layers to ``folder``."""
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rope_parameters": LLAMA3,
        "rms_norm_eps": 1e-5,
    }
    model = randomized(LlamaForCausalLM(LlamaConfig(**{**values, **options})), seed).to(dtype)
    model.save_pretrained(folder)
    return model


_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "pad_token_id": 0,
    "eos_token_id": 2,
}
_EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "n_group": 1,
    "topk_group": 1,
    "rms_norm_eps": 1e-2,  # not that of the latents' norms
}
BASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "moonlight": ("deepseek-v3", "DeepseekV3", _DEEPSEEK),
    "deepseek-v3": (
        "deepseek-v3",
        "DeepseekV3",
        {**_DEEPSEEK, "q_lora_rank": 12, "n_group": 4, "topk_group": 2, "rope_parameters": YARN},
    ),
    "qwen3-moe": ("qwen3-moe", "Qwen3Moe", {**_EXPERTS, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3-moe with a dense layer": (
        "qwen3-moe",
        "Qwen3Moe",
        {**_EXPERTS, "head_dim": 4, "mlp_only_layers": [0], "tie_word_embeddings": True},
    ),
    "qwen2-moe": ("qwen2-moe", "Qwen2Moe", {**_EXPERTS, "shared_expert_intermediate_size": 24}),
    "mixtral": ("mixtral", "Mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "mixtral with wide heads": (
        "mixtral",
        "Mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 16},
    ),
    "olmoe": ("olmoe", "Olmoe", {"num_experts": 6, "num_experts_per_tok": 2, "num_key_value_heads": 4}),
    "olmoe with groups": ("olmoe", "Olmoe", {"num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True}),
    "qwen2": ("qwen2", "Qwen2", {}),
    "qwen2, tied": ("qwen2", "Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", "Qwen3", {"head_dim": 16}),
    "qwen3, tied": ("qwen3", "Qwen3", {"head_dim": 4, "tie_word_embeddings": True}),
    "smollm2": ("llama", "Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
}
"""Name -> format, class in transformers, and what a tiny model of it has."""


def write_base(name: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> torch.nn.Module:
    """Write a tiny random model of :data:`BASES` to ``folder``."""
    _, kind, values = BASES[name]
    config = getattr(transformers, f"{kind}Config")(**{**_SIZES, **values, **options})
    model = randomized(getattr(transformers, f"{kind}ForCausalLM")(config), seed=3)
    generator = torch.Generator().manual_seed(4)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
    model = model.to(dtype)
    model.save_pretrained(folder)
    return model


def fresh_copy(folder: Path) -> torch.nn.Module:
    """The model of a folder as transformers reads it, in fp32."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    # Frequencies are no weights; transformers leaves them unset where torch's factories have stand-ins.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model.eval()
