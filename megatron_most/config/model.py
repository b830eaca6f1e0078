"""The model: DeepSeek-V2's shape at any size, with expert groups per modality."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_most.config.rules import require, require_not_negative, require_one_of, require_positive
from megatron_most.vocab import MODALITY_NAMES, VocabLayout

VOCAB_MULTIPLE = 128
"""Ids and codes are padded to this multiple, whatever the tensor-parallel size, so that layouts can be exchanged."""


@dataclass
class RopeConfig:
    """Rotary position embedding. The YaRN fields are read only when ``type`` is ``yarn``."""

    type: str = "rope"
    base: float = 10000.0
    scaling_factor: float = 40.0
    original_max_position: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.707
    mscale_all_dim: float = 0.707

    def __post_init__(self) -> None:
        require_one_of("model.attention.rope.type", self.type, ("rope", "yarn"))
        require_positive("model.attention.rope", self, ("base", "scaling_factor", "original_max_position"))


@dataclass
class AttentionConfig:
    """Multi-latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1). Head sizes are per head."""

    num_heads: int = 16
    kv_lora_rank: int = 512
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope: RopeConfig = field(default_factory=RopeConfig)

    def __post_init__(self) -> None:
        section = "model.attention"
        require_positive(
            section, self, ("num_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        )
        require(self.qk_rope_head_dim % 2 == 0, f"{section}.qk_rope_head_dim", self.qk_rope_head_dim, "must be even")
        if self.q_lora_rank is not None:
            require_positive(section, self, ("q_lora_rank",))


@dataclass
class ExpertGroupConfig:
    """The experts one modality may choose from: ``size`` experts, ``top_k`` of them per token."""

    modality: str
    size: int
    top_k: int

    def __post_init__(self) -> None:
        where = f"model.moe.groups[{self.modality}]"
        require_one_of("model.moe.groups.modality", self.modality, MODALITY_NAMES)
        require_positive(where, self, ("size", "top_k"))
        require(self.top_k <= self.size, f"{where}.top_k", self.top_k, f"must not exceed the group's size, {self.size}")


def _text_and_audio() -> list[ExpertGroupConfig]:
    return [ExpertGroupConfig("text", 32, 6), ExpertGroupConfig("audio", 32, 6)]


@dataclass
class MoEConfig:
    """The modality-aware mixture of experts; see docs/model.md for every option.

    ``balance_coeff`` weighs the load-balancing loss of each group as Megatron's ``moe_aux_loss_coeff`` does with a
    per-token loss: the sum over routed positions is divided by the number of targets.
    """

    groups: list[ExpertGroupConfig] = field(default_factory=_text_and_audio)
    ffn_hidden_size: int = 1408
    shared_ffn_hidden_size: int = 2816
    score_rule: str = "group"
    normalize_top_k: bool = False
    routed_scaling_factor: float = 1.0
    expert_order: str = "interleaved"
    balance_loss: str = "seq_aux_loss"
    balance_coeff: float = 1e-3
    z_loss_coeff: float = 0.0
    dispatcher: str = "alltoall"

    def __post_init__(self) -> None:
        section = "model.moe"
        names = [group.modality for group in self.groups]
        require(
            sorted(names) == sorted(MODALITY_NAMES),
            f"{section}.groups",
            names,
            f"needs exactly one group for each modality ({', '.join(MODALITY_NAMES)})",
        )
        top_ks = [group.top_k for group in self.groups]
        require(len(set(top_ks)) == 1, f"{section}.groups.top_k", top_ks, "must be the same in every group")
        require_positive(section, self, ("ffn_hidden_size", "routed_scaling_factor"))
        require_not_negative(section, self, ("shared_ffn_hidden_size", "balance_coeff", "z_loss_coeff"))
        require_one_of(f"{section}.score_rule", self.score_rule, ("group", "all"))
        require_one_of(f"{section}.expert_order", self.expert_order, ("interleaved", "contiguous"))
        require_one_of(f"{section}.balance_loss", self.balance_loss, ("none", "aux_loss", "seq_aux_loss"))
        require_one_of(f"{section}.dispatcher", self.dispatcher, ("alltoall", "allgather"))

    @property
    def num_experts(self) -> int:
        return sum(group.size for group in self.groups)

    @property
    def top_k(self) -> int:
        return self.groups[0].top_k


@dataclass
class ModelConfig:
    """A MoST model without its vocabulary. The defaults are DeepSeek-V2-Lite's dimensions.

    The training loss of a target is the main head's cross entropy; a frame's adds its codebooks', each weighted by
    ``codebook_loss_weights`` (1 each when empty), and a text target's is multiplied by ``text_loss_weight``: a
    transcript has a few targets where its speech has hundreds.
    """

    num_layers: int = 27
    hidden_size: int = 2048
    ffn_hidden_size: int = 10944
    num_dense_layers: int = 1
    norm_epsilon: float = 1e-6
    init_std: float = 0.02
    codebook_loss_weights: list[float] = field(default_factory=list)
    text_loss_weight: float = 1.0
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)

    def __post_init__(self) -> None:
        require_positive(
            "model",
            self,
            ("num_layers", "hidden_size", "ffn_hidden_size", "norm_epsilon", "init_std", "text_loss_weight"),
        )
        require(
            0 <= self.num_dense_layers < self.num_layers,
            "model.num_dense_layers",
            self.num_dense_layers,
            f"must leave at least one of the {self.num_layers} layers for experts",
        )
        for weight in self.codebook_loss_weights:
            require(weight >= 0, "model.codebook_loss_weights", self.codebook_loss_weights, "must not be negative")

    def codebook_weights(self, vocab: VocabLayout) -> list[float]:
        """One loss weight per codebook; 1.0 each unless set."""
        return self.codebook_loss_weights or [1.0] * vocab.num_codebooks
