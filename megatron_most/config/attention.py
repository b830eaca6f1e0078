"""Attention and its rotary position embedding."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_most.config.rules import require, require_not_negative, require_one_of, require_positive
from megatron_most.keys import key


@dataclass
class RopeConfig:
    """Rotary position embedding.

    With m(x) = 0.1 x ln(rotary_scaling_factor) + 1, ``yarn`` (arXiv 2309.00071) scales the rotated parts of queries and
    keys each by m(mscale) / m(mscale_all_dim). As in DeepSeek-V2, ``mla`` also scales all logits by the square of
    m(mscale_all_dim). YaRN as first published, which a Llama without these two fields means, is ``mscale=1`` and
    ``mscale_all_dim=0``.
    """

    rope_type: str = key(
        "rope", "`rope`, `yarn`, or `llama3` (the rescaling of Llama 3.1 and later; `gqa` only)", "--rope-type"
    )
    rotary_base: float = key(10000.0, "base of the rotary frequencies", "--rotary-base")
    rotary_scaling_factor: float = key(
        40.0, "`yarn`, `llama3`: new context length over the original one", "--rotary-scaling-factor"
    )
    original_max_position_embeddings: int = key(4096, "`yarn`, `llama3`: context length before the extension")
    beta_fast: float = key(32.0, "`yarn`: frequencies with more rotations over the original context are kept")
    beta_slow: float = key(
        1.0, "`yarn`: frequencies with fewer rotations over it are divided by `rotary_scaling_factor`"
    )
    mscale: float = key(0.707, "`yarn`: scales queries and keys by the formula above", "--mscale")
    mscale_all_dim: float = key(
        0.707, "`yarn`: scales queries, keys and logits by the formula above", "--mscale-all-dim"
    )

    def __post_init__(self) -> None:
        section = "model.attention.rope"
        require_one_of(f"{section}.rope_type", self.rope_type, ("rope", "yarn", "llama3"))
        require(self.rotary_base > 1, f"{section}.rotary_base", self.rotary_base, "must be greater than 1")
        require_positive(
            section, self, ("rotary_scaling_factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
        )
        require_not_negative(section, self, ("mscale", "mscale_all_dim"))


@dataclass
class AttentionConfig:
    """Multi-latent attention (``mla``, arXiv 2405.04434, section 2.1) or grouped-query attention (``gqa``)."""

    type: str = key("mla", "`mla` (DeepSeek-V2) or `gqa` (Llama)", "--multi-latent-attention")
    num_attention_heads: int = key(16, "query heads", "--num-attention-heads", most=1 << 16)
    kv_lora_rank: int = key(512, "`mla`: rank of the latent of keys and values", "--kv-lora-rank")
    q_lora_rank: int | None = key(None, "`mla`: rank of the latent of queries; null for none", "--q-lora-rank")
    qk_head_dim: int = key(128, "`mla`: size of a query or key head without its rotated part", "--qk-head-dim")
    qk_pos_emb_head_dim: int = key(
        64, "`mla`: size of the rotated part of a query or key head", "--qk-pos-emb-head-dim"
    )
    v_head_dim: int = key(128, "`mla`: size of a value head", "--v-head-dim")
    num_query_groups: int = key(8, "`gqa`: key-value heads", "--num-query-groups")
    kv_channels: int = key(128, "`gqa`: size of a head", "--kv-channels")
    add_qkv_bias: bool = key(
        False, "`gqa`: the projections of queries, keys and values have biases (Qwen2)", "--add-qkv-bias"
    )
    qk_layernorm: str = key(
        "none",
        "`gqa`: RMS norms of queries and keys before they are rotated: `none`, `head` (each head by itself, Qwen3;"
        " Megatron's flag) or `all_heads` (those of a token together, OLMoE). `mla` always has norms of its latents",
        "--qk-layernorm",
    )
    latent_layernorm_epsilon: float | None = key(
        None, "`mla`: epsilon of the latents' norms; null for `model.layernorm_epsilon`"
    )
    mla_down_proj_fusion: bool = key(
        False,
        "`mla` with `q_lora_rank`: compute both down-projections in one matrix product; checkpoints stay the same",
        "--mla-down-proj-fusion",
        training_only=True,
    )
    rope: RopeConfig = key(RopeConfig, "rotary position embedding")

    def __post_init__(self) -> None:
        section = "model.attention"
        require_one_of(f"{section}.type", self.type, ("mla", "gqa"))
        require_positive(section, self, ("num_attention_heads",))
        require(
            not self.mla_down_proj_fusion or (self.type == "mla" and self.q_lora_rank is not None),
            f"{section}.mla_down_proj_fusion",
            self.mla_down_proj_fusion,
            f"needs {section}.type=mla with a q_lora_rank; otherwise there is only one down-projection",
        )
        require_one_of(f"{section}.qk_layernorm", self.qk_layernorm, ("none", "head", "all_heads"))
        if self.type == "mla":
            self._check_mla(section)
            for name, neutral in (("add_qkv_bias", False), ("qk_layernorm", "none")):
                value = getattr(self, name)
                require(value == neutral, f"{section}.{name}", value, f"needs {section}.type=gqa")
        else:
            self._check_gqa(section)

    def _check_mla(self, section: str) -> None:
        require_positive(section, self, ("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"))
        for size in ("qk_head_dim", "qk_pos_emb_head_dim"):  # rotation works on pairs
            require(getattr(self, size) % 2 == 0, f"{section}.{size}", getattr(self, size), "must be even")
        require(
            self.rope.rope_type != "llama3",
            f"{section}.rope.rope_type",
            self.rope.rope_type,
            f"needs {section}.type=gqa",
        )
        if self.q_lora_rank is not None:
            require_positive(section, self, ("q_lora_rank",))
        if self.latent_layernorm_epsilon is not None:
            require_positive(section, self, ("latent_layernorm_epsilon",))

    def _check_gqa(self, section: str) -> None:
        require_positive(section, self, ("num_query_groups", "kv_channels"))
        require(
            self.latent_layernorm_epsilon is None,
            f"{section}.latent_layernorm_epsilon",
            self.latent_layernorm_epsilon,
            f"needs {section}.type=mla",
        )
        require(self.kv_channels % 2 == 0, f"{section}.kv_channels", self.kv_channels, "must be even")
        require(
            self.num_attention_heads % self.num_query_groups == 0,
            f"{section}.num_query_groups",
            self.num_query_groups,
            f"must divide {section}.num_attention_heads, {self.num_attention_heads}",
        )

    def projections(self) -> dict[str, tuple[int, bool]]:
        """Width of each projection, and whether tensor parallelism splits it, by the key that sets it."""
        heads = self.num_attention_heads
        if self.type == "gqa":
            return {
                "model.attention.num_attention_heads": (heads * self.kv_channels, True),
                "model.attention.num_query_groups": (self.num_query_groups * self.kv_channels, True),
            }
        sizes = {
            "model.attention.qk_head_dim": (heads * (self.qk_head_dim + self.qk_pos_emb_head_dim), True),
            "model.attention.v_head_dim": (heads * self.v_head_dim, True),
            "model.attention.kv_lora_rank": (self.kv_lora_rank, False),
            "model.attention.qk_pos_emb_head_dim": (self.kv_lora_rank + self.qk_pos_emb_head_dim, False),
        }
        return sizes | ({"model.attention.q_lora_rank": (self.q_lora_rank, False)} if self.q_lora_rank else {})
