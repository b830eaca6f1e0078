"""The model: DeepSeek-V2's shape at any size, with expert groups per modality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_most.config.rules import require, require_not_negative, require_one_of, require_positive
from megatron_most.keys import REQUIRED, key
from megatron_most.vocab import VocabLayout

VOCAB_MULTIPLE = 128
"""Ids and codes are padded to this multiple, whatever the tensor-parallel size, so that layouts can be exchanged."""


@dataclass
class RopeConfig:
    """Rotary position embedding.

    With m(x) = 0.1 x ln(rotary_scaling_factor) + 1, ``yarn`` (arXiv 2309.00071) scales the rotated parts of queries and
    keys each by m(mscale) / m(mscale_all_dim), and ``mla`` scales all logits by m(mscale_all_dim) squared besides, as
    DeepSeek-V2 does. YaRN as first published, which a Llama without these two fields means, is ``mscale=1`` and
    ``mscale_all_dim=0``.
    """

    rope_type: str = key(
        "rope", "`rope`, `yarn`, or `llama3` (the rescaling of Llama 3.1 and later; `gqa` only)", "--rope-type"
    )
    rotary_base: float = key(10000.0, "base of the frequencies", "--rotary-base")
    rotary_scaling_factor: float = key(
        40.0, "`yarn`, `llama3`: how many times the original context", "--rotary-scaling-factor"
    )
    original_max_position_embeddings: int = key(4096, "`yarn`, `llama3`: positions before the rescaling")
    beta_fast: float = key(32.0, "`yarn`: frequencies with more rotations over the original context are kept")
    beta_slow: float = key(1.0, "`yarn`: frequencies with fewer rotations are divided by the factor")
    mscale: float = key(0.707, "`yarn`: see above", "--mscale")
    mscale_all_dim: float = key(0.707, "`yarn`: see above", "--mscale-all-dim")

    def __post_init__(self) -> None:
        require_one_of("model.attention.rope.rope_type", self.rope_type, ("rope", "yarn", "llama3"))
        section = "model.attention.rope"
        require(self.rotary_base > 1, f"{section}.rotary_base", self.rotary_base, "must be greater than 1")
        require_positive(
            section, self, ("rotary_scaling_factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
        )
        require_not_negative(section, self, ("mscale", "mscale_all_dim"))


@dataclass
class AttentionConfig:
    """Multi-latent attention (``mla``, arXiv 2405.04434, section 2.1) or grouped-query attention (``gqa``)."""

    type: str = key("mla", "`mla` (DeepSeek-V2) or `gqa` (Llama)", "--multi-latent-attention")
    num_attention_heads: int = key(16, "query heads", "--num-attention-heads")
    kv_lora_rank: int = key(512, "`mla`: rank of the keys' and values' latent", "--kv-lora-rank")
    q_lora_rank: int | None = key(None, "`mla`: rank of the queries' latent; null for none", "--q-lora-rank")
    qk_head_dim: int = key(128, "`mla`: size of a head's part without rotation", "--qk-head-dim")
    qk_pos_emb_head_dim: int = key(64, "`mla`: size of a head's rotated part", "--qk-pos-emb-head-dim")
    v_head_dim: int = key(128, "`mla`: size of a head's values", "--v-head-dim")
    num_query_groups: int = key(8, "`gqa`: key-value heads", "--num-query-groups")
    kv_channels: int = key(128, "`gqa`: size of a head", "--kv-channels")
    mla_down_proj_fusion: bool = key(
        False,
        "`mla` with `q_lora_rank`: compute both down-projections as one product; checkpoints are the same",
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
            f"needs {section}.type=mla with a q_lora_rank: else there is one down-projection, and nothing to fuse",
        )
        if self.type == "gqa":
            require_positive(section, self, ("num_query_groups", "kv_channels"))
            require(self.kv_channels % 2 == 0, f"{section}.kv_channels", self.kv_channels, "must be even")
            require(
                self.num_attention_heads % self.num_query_groups == 0,
                f"{section}.num_query_groups",
                self.num_query_groups,
                f"must divide {section}.num_attention_heads, {self.num_attention_heads}",
            )
            return
        require_positive(section, self, ("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"))
        for size in ("qk_head_dim", "qk_pos_emb_head_dim"):  # heads are rotated in pairs
            require(getattr(self, size) % 2 == 0, f"{section}.{size}", getattr(self, size), "must be even")
        require(
            self.rope.rope_type != "llama3",
            f"{section}.rope.rope_type",
            self.rope.rope_type,
            f"needs {section}.type=gqa",
        )
        if self.q_lora_rank is not None:
            require_positive(section, self, ("q_lora_rank",))

    def projections(self) -> dict[str, tuple[int, bool]]:
        """Sizes of the projections by the option that decides each; whether tensor parallelism cuts them."""
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


@dataclass
class ExpertGroupConfig:
    """The experts of one modality.

    A group is given by its ``size`` or by a list of ``experts``; all groups the same way. Its tokens choose among these
    and the common experts that are open to the modality.
    """

    modality: str = key(REQUIRED, "whose tokens: `text`, `audio`, or a name of `vocab.further_modalities`")
    size: int = key(0, "experts in the group's pool", "--num-experts")
    moe_router_topk: int = key(6, "experts each token of the modality chooses", "--moe-router-topk")
    experts: list[int] = key(list, "instead of `size`: the pool's experts by their numbers in the base model")
    moe_router_num_groups: int = key(
        1,
        "group-limited routing: cut the experts to choose from into this many runs of equal length",
        "--moe-router-num-groups",
    )
    moe_router_group_topk: int = key(
        1, "group-limited routing: choose from the best of these runs only", "--moe-router-group-topk"
    )
    moe_aux_loss_coeff: float | None = key(
        None, "for this modality in place of `model.moe`'s", "--moe-aux-loss-coeff", training_only=True
    )
    moe_z_loss_coeff: float | None = key(
        None, "for this modality in place of `model.moe`'s", "--moe-z-loss-coeff", training_only=True
    )

    def __post_init__(self) -> None:
        where = f"model.moe.groups[{self.modality}]"
        require_positive(where, self, ("moe_router_topk", "moe_router_num_groups", "moe_router_group_topk"))
        self.size = _size_of(where, self.size, self.experts)
        require(
            self.moe_router_group_topk <= self.moe_router_num_groups,
            f"{where}.moe_router_group_topk",
            self.moe_router_group_topk,
            f"must not exceed moe_router_num_groups, {self.moe_router_num_groups}",
        )
        for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"{where}.{name}", value, "must not be negative")


def number_experts(pools: Sequence[tuple[int, Sequence[int]]]) -> list[tuple[int, ...]]:
    """The experts of each pool, which is given by its size and, in all pools or none, the list of them.

    Pools without lists have the experts one after another.
    """
    found, start = [], 0
    for size, experts in pools:
        found.append(tuple(experts) or tuple(range(start, start + size)))
        start += size
    return found


@dataclass
class CommonExpertsConfig:
    """Routed experts that several modalities may choose, beside those of their own group; none by default."""

    size: int = key(0, "how many")
    experts: list[int] = key(list, "instead of `size`: their numbers in the base model")
    modalities: list[str] = key(list, "who may choose them; everyone when empty")

    def __post_init__(self) -> None:
        self.size = _size_of("model.moe.common", self.size, self.experts)


def _size_of(where: str, size: int, experts: list[int]) -> int:
    require(size >= 0, f"{where}.size", size, "must not be negative")
    require(len(set(experts)) == len(experts), f"{where}.experts", experts, "names an expert twice")
    require(
        not experts or size in (0, len(experts)),
        f"{where}.size",
        size,
        f"must be left out or equal the length of experts, {len(experts)}",
    )
    return len(experts) or size


def _text_and_audio() -> list[ExpertGroupConfig]:
    return [ExpertGroupConfig("text", 32, 6), ExpertGroupConfig("audio", 32, 6)]


@dataclass
class MoEConfig:
    """The modality-aware mixture of experts; docs/routing.md describes every option.

    Losses are weighted as in Megatron with a per-token loss: the sum over routed positions is divided by the number
    of targets.
    """

    groups: list[ExpertGroupConfig] = key(
        _text_and_audio, "one group for each modality, in the vocabulary's order; by default text and audio, 32 each"
    )
    common: CommonExpertsConfig = key(CommonExpertsConfig, "experts that modalities share")
    moe_ffn_hidden_size: int = key(1408, "inner width of a routed expert", "--moe-ffn-hidden-size")
    moe_shared_expert_intermediate_size: int = key(
        2816,
        "inner width of the shared experts together; 0 for none",
        "--moe-shared-expert-intermediate-size",
    )
    moe_router_score_function: str = key("softmax", "`softmax` or `sigmoid`", "--moe-router-score-function")
    score_rule: str = key(
        "group", "softmax over the experts a token may choose (`group`) or over all of them (`all`, the paper's)"
    )
    norm_topk_prob: bool = key(False, "divide the gates of a token's experts by their sum (Hugging Face's name)")
    moe_router_topk_scaling_factor: float = key(1.0, "multiplies the gates", "--moe-router-topk-scaling-factor")
    router_weights: str = key("shared", "one router matrix for all (`shared`), or `per_modality`")
    expert_order: str = key(
        "interleaved",
        "in memory: every rank holds an equal share of each pool (`interleaved`), or `contiguous`",
        training_only=True,
    )
    moe_router_load_balancing_type: str = key(
        "seq_aux_loss",
        "balancing loss: `seq_aux_loss`, `aux_loss`, `global_aux_loss` or `none`",
        "--moe-router-load-balancing-type",
        training_only=True,
    )
    balance_scope: str = key("modality", "measure the load inside each modality, or `pooled` over all tokens")
    moe_aux_loss_coeff: float = key(1e-3, "weight of the balancing loss", "--moe-aux-loss-coeff", training_only=True)
    moe_z_loss_coeff: float = key(0.0, "weight of the router's z-loss", "--moe-z-loss-coeff", training_only=True)
    orthogonality_coeff: float = key(0.0, "weight of the loss on similar router rows", training_only=True)
    moe_router_bias_update_rate: float = key(
        0.0,
        "balancing without a loss: how fast expert biases move; 0 for no biases, and checkpoints hold none",
        "--moe-router-bias-update-rate",
        training_only=True,
    )
    expert_backend: str = key(
        "grouped",
        "who computes the experts: `grouped` (torch's grouped product), `sequential` or `transformer_engine`",
        training_only=True,
    )
    moe_token_dispatcher_type: str = key(
        "alltoall",
        "`alltoall`, `allgather`, `deepep` or `hybridep`; the last two are Megatron's `flex` dispatcher with that"
        " `--moe-flex-dispatcher-backend`",
        "--moe-token-dispatcher-type",
        training_only=True,
    )
    moe_shared_expert_overlap: bool = key(
        False,
        "compute shared experts while tokens travel (`alltoall` only)",
        "--moe-shared-expert-overlap",
        training_only=True,
    )
    moe_permute_fusion: bool | None = key(
        None,
        "sort tokens with Transformer Engine's kernels (`alltoall` only); null: where it computes the other parts",
        "--moe-permute-fusion",
        training_only=True,
    )

    def __post_init__(self) -> None:
        section = "model.moe"
        require_positive(section, self, ("moe_ffn_hidden_size", "moe_router_topk_scaling_factor"))
        require_not_negative(
            section,
            self,
            (
                "moe_shared_expert_intermediate_size",
                "moe_aux_loss_coeff",
                "moe_z_loss_coeff",
                "orthogonality_coeff",
                "moe_router_bias_update_rate",
            ),
        )
        choices = {
            "moe_router_score_function": ("softmax", "sigmoid"),
            "score_rule": ("group", "all"),
            "router_weights": ("shared", "per_modality"),
            "expert_order": ("interleaved", "contiguous"),
            "balance_scope": ("modality", "pooled"),
            "moe_router_load_balancing_type": ("none", "aux_loss", "seq_aux_loss", "global_aux_loss"),
            "expert_backend": ("grouped", "sequential", "transformer_engine"),
            "moe_token_dispatcher_type": ("alltoall", "allgather", "deepep", "hybridep"),
        }
        for name, valid in choices.items():
            require_one_of(f"{section}.{name}", getattr(self, name), valid)
        require(
            self.moe_router_score_function == "softmax" or self.score_rule == "group",
            f"{section}.score_rule",
            self.score_rule,
            "sigmoid scores are taken expert by expert; only group makes sense with moe_router_score_function=sigmoid",
        )
        require(
            not self.moe_shared_expert_overlap
            or (self.moe_shared_expert_intermediate_size > 0 and self.moe_token_dispatcher_type == "alltoall"),
            f"{section}.moe_shared_expert_overlap",
            self.moe_shared_expert_overlap,
            "needs shared experts (moe_shared_expert_intermediate_size) and moe_token_dispatcher_type=alltoall",
        )
        require(
            not self.moe_permute_fusion or self.moe_token_dispatcher_type == "alltoall",
            f"{section}.moe_permute_fusion",
            self.moe_permute_fusion,
            "needs moe_token_dispatcher_type=alltoall; the others permute in their own ways",
        )
        self._check_groups()

    def _check_groups(self) -> None:
        section = "model.moe"
        names = [group.modality for group in self.groups]
        require(bool(names), f"{section}.groups", names, "needs a group for each modality")
        require(len(set(names)) == len(names), f"{section}.groups", names, "names a modality twice")
        require("common" not in names, f"{section}.groups", names, "common is the name of the common experts")
        require(
            not self.common.modalities or self.common.size > 0,
            f"{section}.common.modalities",
            self.common.modalities,
            "needs common experts (common.size or common.experts)",
        )
        unknown = [name for name in self.common.modalities if name not in names]
        require(not unknown, f"{section}.common.modalities", unknown, f"must be among {', '.join(names)}")
        pools = [*self.groups, *([self.common] if self.common.size else [])]
        listed = [bool(pool.experts) for pool in pools if pool.size]
        require(
            all(listed) or not any(listed),
            f"{section}.groups",
            names,
            "give every group (and the common experts) by size, or every one by its list of experts",
        )
        if any(listed):
            experts = sorted(expert for pool in pools for expert in pool.experts)
            require(
                experts == list(range(len(experts))),
                f"{section}.groups.experts",
                experts,
                f"must name each expert from 0 to {len(experts) - 1} exactly once over all groups",
            )
        for group in self.groups:
            where = f"{section}.groups[{group.modality}]"
            choice = group.size + self.num_common(group.modality)
            require(
                group.moe_router_topk <= choice,
                f"{where}.moe_router_topk",
                group.moe_router_topk,
                f"must not exceed the {choice} experts its tokens may choose",
            )
            require(
                choice % group.moe_router_num_groups == 0,
                f"{where}.moe_router_num_groups",
                group.moe_router_num_groups,
                f"must divide the {choice} experts its tokens may choose",
            )
            left = choice // group.moe_router_num_groups * group.moe_router_group_topk
            require(
                group.moe_router_topk <= left,
                f"{where}.moe_router_group_topk",
                group.moe_router_group_topk,
                f"leaves {left} experts for moe_router_topk={group.moe_router_topk}",
            )

    def num_common(self, modality: str) -> int:
        """Common experts that tokens of ``modality`` may choose."""
        return self.common.size if modality in (self.common.modalities or [modality]) else 0

    @property
    def num_experts(self) -> int:
        return sum(group.size for group in self.groups) + self.common.size

    @property
    def max_top_k(self) -> int:
        return max(group.moe_router_topk for group in self.groups)


@dataclass
class ModelConfig:
    """A MoST model without its vocabulary. The defaults are DeepSeek-V2-Lite's dimensions.

    The training loss of a target is the main head's cross entropy; a frame's adds its codebooks'.
    """

    transformer_impl: str = key(
        "auto",
        "whose modules compute attention, norms and linear layers: `transformer_engine`, `portable` (torch alone), or"
        " `auto`: Transformer Engine's where it is installed and there is a GPU. Weights are the same",
        "--transformer-impl",
        training_only=True,
    )
    num_layers: int = key(27, "layers", "--num-layers")
    hidden_size: int = key(2048, "width", "--hidden-size")
    ffn_hidden_size: int = key(10944, "inner width of the dense layers", "--ffn-hidden-size")
    first_k_dense_replace: int = key(
        1,
        "layers without experts, before all others (Hugging Face's name; Megatron takes a list)",
        "--moe-layer-freq",
    )
    layernorm_epsilon: float = key(1e-6, "epsilon of the RMS norms", "--norm-epsilon")
    init_method_std: float = key(0.02, "standard deviation of initial weights", "--init-method-std", training_only=True)
    codebook_loss_weights: list[float] = key(
        list,
        "one for each codebook, 1 each when empty; where codes are ids, the code's own loss is weighted",
        training_only=True,
    )
    text_loss_weight: float = key(
        1.0,
        "multiplies the loss of text targets: a transcript has a few where its speech has hundreds",
        training_only=True,
    )
    attention: AttentionConfig = key(AttentionConfig, "attention")
    moe: MoEConfig = key(MoEConfig, "experts and router")

    def __post_init__(self) -> None:
        require_positive(
            "model",
            self,
            (
                "num_layers",
                "hidden_size",
                "ffn_hidden_size",
                "layernorm_epsilon",
                "init_method_std",
                "text_loss_weight",
            ),
        )
        require_one_of("model.transformer_impl", self.transformer_impl, ("auto", "portable", "transformer_engine"))
        require(
            0 <= self.first_k_dense_replace < self.num_layers,
            "model.first_k_dense_replace",
            self.first_k_dense_replace,
            f"must leave at least one of the {self.num_layers} layers for experts",
        )
        for weight in self.codebook_loss_weights:
            require(weight >= 0, "model.codebook_loss_weights", self.codebook_loss_weights, "must not be negative")

    def codebook_weights(self, vocab: VocabLayout) -> list[float]:
        """One loss weight per codebook; 1.0 each unless set."""
        return self.codebook_loss_weights or [1.0] * vocab.num_codebooks
