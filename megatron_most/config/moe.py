"""The modality-aware mixture of experts: expert groups, common experts, router, losses and implementation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_most.config.rules import require, require_not_negative, require_one_of, require_positive
from megatron_most.keys import REQUIRED, key


@dataclass
class ExpertGroupConfig:
    """The expert group of one modality: its pool of experts, and how many of them a token gets.

    A pool is given by its ``size`` or by a list of ``experts``, the same way in all groups. A token may choose the
    experts of its modality's pool and the common experts that are open to the modality.
    """

    modality: str = key(REQUIRED, "`text`, `audio`, or a name in `vocab.further_modalities`")
    size: int = key(0, "experts in the pool", "--num-experts", most=1 << 16)
    moe_router_topk: int = key(6, "experts per token", "--moe-router-topk")
    experts: list[int] = key(list, "instead of `size`: the numbers that the pool's experts have in the base model")
    moe_router_num_groups: int = key(
        1,
        "group-limited routing: divide the experts that a token may choose into this many equal blocks",
        "--moe-router-num-groups",
    )
    moe_router_group_topk: int = key(
        1,
        "group-limited routing: number of these blocks that a token's experts may come from",
        "--moe-router-group-topk",
    )
    moe_aux_loss_coeff: float | None = key(
        None,
        "replaces `model.moe.moe_aux_loss_coeff` for this modality; null keeps it",
        "--moe-aux-loss-coeff",
        training_only=True,
    )
    moe_z_loss_coeff: float | None = key(
        None,
        "replaces `model.moe.moe_z_loss_coeff` for this modality; null keeps it",
        "--moe-z-loss-coeff",
        training_only=True,
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


@dataclass
class CommonExpertsConfig:
    """Routed experts that tokens of several modalities may choose beside those of their own pool; none by default."""

    size: int = key(0, "common experts", most=1 << 16)
    experts: list[int] = key(list, "instead of `size`: the numbers that they have in the base model")
    modalities: list[str] = key(list, "modalities whose tokens may choose them; all when empty")

    def __post_init__(self) -> None:
        self.size = _size_of("model.moe.common", self.size, self.experts)


def number_experts(pools: Sequence[tuple[int, Sequence[int]]]) -> list[tuple[int, ...]]:
    """The experts of each pool. A pool is its size and, in all pools or in none, the list of its experts.

    Pools without lists get consecutive experts.
    """
    found, start = [], 0
    for size, experts in pools:
        found.append(tuple(experts) or tuple(range(start, start + size)))
        start += size
    return found


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
        _text_and_audio, "one group per modality, in the vocabulary's order; by default text and audio, 32 experts each"
    )
    common: CommonExpertsConfig = key(CommonExpertsConfig, "experts that modalities share")
    moe_ffn_hidden_size: int = key(1408, "inner width of a routed expert", "--moe-ffn-hidden-size", most=1 << 24)
    moe_shared_expert_intermediate_size: int = key(
        2816,
        "inner width of all shared experts together; 0 for none",
        "--moe-shared-expert-intermediate-size",
    )
    moe_shared_expert_gate: bool = key(
        False,
        "multiply the shared experts' output by the sigmoid of a learned product with their input (Qwen2-MoE)",
        "--moe-shared-expert-gate",
    )
    moe_router_score_function: str = key("softmax", "`softmax` or `sigmoid`", "--moe-router-score-function")
    score_rule: str = key(
        "group", "softmax over the experts that a token may choose (`group`) or over all (`all`, as in the paper)"
    )
    norm_topk_prob: bool = key(False, "divide the probs of a token's experts by their sum (Hugging Face's name)")
    moe_router_topk_scaling_factor: float = key(
        1.0, "factor on the probs of a token's experts", "--moe-router-topk-scaling-factor"
    )
    router_weights: str = key("shared", "one router matrix for all modalities (`shared`) or one each (`per_modality`)")
    expert_order: str = key(
        "interleaved",
        "experts on expert-parallel ranks: an equal share of each pool on every rank (`interleaved`), or in logical"
        " order (`contiguous`)",
        training_only=True,
    )
    moe_router_load_balancing_type: str = key(
        "seq_aux_loss",
        "load-balancing loss: `seq_aux_loss`, `aux_loss`, `global_aux_loss` or `none`",
        "--moe-router-load-balancing-type",
        training_only=True,
    )
    balance_scope: str = key(
        "modality",
        "the load-balancing loss measures load within each modality (`modality`) or over all tokens (`pooled`)",
        training_only=True,
    )
    moe_aux_loss_coeff: float = key(
        1e-3, "weight of the load-balancing loss", "--moe-aux-loss-coeff", training_only=True
    )
    moe_z_loss_coeff: float = key(0.0, "weight of the router's z-loss", "--moe-z-loss-coeff", training_only=True)
    orthogonality_coeff: float = key(
        0.0, "weight of a loss that makes the rows of the router matrix orthogonal", training_only=True
    )
    moe_router_bias_update_rate: float = key(
        0.0,
        "balancing by expert biases: their change per step; 0 for no biases, also in checkpoints",
        "--moe-router-bias-update-rate",
        training_only=True,
    )
    expert_backend: str = key(
        "grouped",
        "implementation of the experts: `grouped` (torch's grouped product), `sequential` (one expert at a time) or"
        " `transformer_engine`",
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
        "compute shared experts during the communication of tokens (`alltoall` only)",
        "--moe-shared-expert-overlap",
        training_only=True,
    )
    moe_permute_fusion: bool | None = key(
        None,
        "permute tokens with Transformer Engine's fused kernels (`alltoall` only); null: yes if Transformer Engine"
        " computes the other parts",
        "--moe-permute-fusion",
        training_only=True,
    )

    moe_router_fusion: bool | None = key(
        False,
        "in training, route by one Triton kernel each way instead of torch's operators; null: measure both at the start"
        " and take the faster",
        "--moe-router-fusion",
        training_only=True,
    )

    def __post_init__(self) -> None:
        section = "model.moe"
        require_positive(section, self, ("moe_ffn_hidden_size", "moe_router_topk_scaling_factor"))
        not_negative = ("moe_shared_expert_intermediate_size", "moe_aux_loss_coeff", "moe_z_loss_coeff")
        require_not_negative(section, self, (*not_negative, "orthogonality_coeff", "moe_router_bias_update_rate"))
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
            "must be group with moe_router_score_function=sigmoid, which scores each expert by itself",
        )
        require(
            not self.moe_shared_expert_gate or self.moe_shared_expert_intermediate_size > 0,
            f"{section}.moe_shared_expert_gate",
            self.moe_shared_expert_gate,
            "needs shared experts (moe_shared_expert_intermediate_size)",
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
            "needs moe_token_dispatcher_type=alltoall; the other dispatchers have their own permutation",
        )
        require(
            not self.moe_router_fusion or not self.is_group_limited,
            f"{section}.moe_router_fusion",
            self.moe_router_fusion,
            "needs moe_router_num_groups=1 in every group: the kernel does not limit tokens to groups of experts",
        )
        self._check_modalities()
        self._check_experts()
        for group in self.groups:
            self._check_choice(group)

    def _check_modalities(self) -> None:
        """Each modality has one group, and the common experts are open to modalities that exist."""
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

    def _check_experts(self) -> None:
        """Every expert is in exactly one pool."""
        pools: list[ExpertGroupConfig | CommonExpertsConfig] = [*self.groups]
        if self.common.size:
            pools.append(self.common)
        listed = [bool(pool.experts) for pool in pools if pool.size]
        require(
            all(listed) or not any(listed),
            "model.moe.groups",
            [group.modality for group in self.groups],
            "give every group (and the common experts) by size, or every one by its list of experts",
        )
        if any(listed):
            experts = sorted(expert for pool in pools for expert in pool.experts)
            require(
                experts == list(range(len(experts))),
                "model.moe.groups.experts",
                experts,
                f"must name each expert from 0 to {len(experts) - 1} exactly once over all groups",
            )

    def _check_choice(self, group: ExpertGroupConfig) -> None:
        """A token finds as many experts as it is to get."""
        where = f"model.moe.groups[{group.modality}]"
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
    def is_group_limited(self) -> bool:
        """Whether any modality chooses its experts from some of several groups (DeepSeek's) only."""
        return any(group.moe_router_num_groups > 1 for group in self.groups)

    @property
    def num_experts(self) -> int:
        return sum(group.size for group in self.groups) + self.common.size

    @property
    def max_top_k(self) -> int:
        return max(group.moe_router_topk for group in self.groups)
