"""Dense bases with grouped-query attention: Llama (and SmolLM2), Qwen2, Qwen3."""

from __future__ import annotations

from megatron_most.conversion.config_json import Field
from megatron_most.conversion.kinds import EVERY_HEAD_ITS_KEY, GROUPED_QUERY, HEAD_SIZE, Dense, head_size


class Llama(Dense):
    """Llama 2, 3, 3.1, and what is built like it, such as SmolLM2."""

    name = "llama"
    model_types = ("llama",)
    transformers_class = "Llama"
    fields = (EVERY_HEAD_ITS_KEY, HEAD_SIZE)
    fixed = {"attention_bias": (False, None), "mlp_bias": (False, None)}


class Qwen2(Dense):
    """Biases of the projections of queries, keys and values."""

    name = "qwen2"
    model_types = ("qwen2",)
    transformers_class = "Qwen2"
    derived = {**Dense.derived, "attention.kv_channels": head_size}
    has = {**Dense.has, "attention": {"type": "gqa", "add_qkv_bias": True}}
    fixed = {"use_sliding_window": (False, None)}
    inert = frozenset({"sliding_window", "max_window_layers"})
    absent = {**Dense.absent, "max_position_embeddings": 32768}


class Qwen3(Dense):
    """Norms of single queries and keys; heads apart from the width of the model."""

    name = "qwen3"
    model_types = ("qwen3",)
    transformers_class = "Qwen3"
    fields = (*GROUPED_QUERY, Field("head_dim", "attention.kv_channels"))
    has = {**Dense.has, "attention": {"type": "gqa", "qk_layernorm": "head"}}
    fixed = {"attention_bias": (False, None), "use_sliding_window": (False, None)}
    inert = Qwen2.inert
    absent = {**Qwen2.absent, "head_dim": 128}
