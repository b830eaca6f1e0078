"""The two kinds of base models, and what each becomes on import and export: a mixture of experts, or a dense model."""

from __future__ import annotations

from typing import Any

from megatron_most.config import RunConfig
from megatron_most.conversion.architecture import Architecture, ForeignModel, Target, require
from megatron_most.conversion.config_json import Config, Field, Values
from megatron_most.conversion.tables import COMMON, UPCYCLED, expert_rules, router_rule
from megatron_most.conversion.weight_map import Correspondence, Origin
from megatron_most.errors import ConfigError
from megatron_most.moe import ExpertGroups


def head_size(config: Config) -> int:
    """The size of a head where the heads together are as wide as the model."""
    return config.integer("hidden_size") // max(1, config.integer("num_attention_heads"))


GROUPED_QUERY = (Field("num_key_value_heads", "attention.num_query_groups"),)
EVERY_HEAD_ITS_KEY = Field(
    "num_key_value_heads",
    "attention.num_query_groups",
    default=lambda config: config.integer("num_attention_heads"),
)
HEAD_SIZE = Field("head_dim", "attention.kv_channels", default=head_size)
"""Fields of grouped-query attention. In some formats the size of a head follows from the others."""


class MixtureOfExperts(Architecture):
    """A base with experts, which are divided between the modalities or copied for each."""

    modes: tuple[str, ...] = ("partition", "expand")
    rules = (*COMMON, router_rule(), *expert_rules())

    def read_routing(self, config: Config) -> dict[str, Any]:
        return {"num_experts": self.num_experts.read(config), "top_k": config.integer("num_experts_per_tok")}

    def write_routing(self, num_experts: int, top_k: int, n_group: int, topk_group: int) -> Values:
        return {self.num_experts.name: num_experts, "num_experts_per_tok": top_k}

    def target(self, config: RunConfig, experts: str, record: dict[str, Any] | None) -> Target:
        has_bias = config.model.moe.moe_router_bias_update_rate > 0
        rule = f"a {self.name} model has {'' if self.has_expert_bias else 'no '}expert biases"
        require({"model.moe.moe_router_bias_update_rate": (has_bias == self.has_expert_bias, rule)})
        return self._whole_base(config, record) if experts == "all" else self._text_model(config)

    def limits_of(self, record: dict[str, Any]) -> tuple[int, int]:
        """Group-limited routing of the base that ``record`` tells of: number of groups, and how many are kept."""
        return 1, 1

    def _text_model(self, config: RunConfig) -> Target:
        """The model with the experts that text may choose. It computes for text what this model computes."""
        moe, text = config.model.moe, config.model.moe.groups[0]
        if moe.score_rule == "all":
            raise ConfigError(
                "model.moe.score_rule='all': cannot be exported: text's gates depend on the scores of experts that text"
                " may not choose"
            )
        choice = ExpertGroups.from_config(moe).choices[0]
        places = {expert: Origin(place) for place, expert in enumerate(choice)}
        experts = tuple(places.get(expert) for expert in range(moe.num_experts))
        foreign = self._foreign(
            config, len(choice), text.moe_router_topk, text.moe_router_num_groups, text.moe_router_group_topk
        )
        return Target(
            foreign, Correspondence((experts,) * _num_moe_layers(config), self.ids(config.vocab, foreign.vocab_size))
        )

    def _whole_base(self, config: RunConfig, record: dict[str, Any] | None) -> Target:
        """The model with every expert, numbered as in the base; without a ``record``, as in this model."""
        moe = config.model.moe
        if moe.router_weights == "per_modality":
            raise ConfigError(f"model.moe.router_weights='per_modality': {self.name} has one router for all experts")
        experts: tuple[tuple[Origin | None, ...], ...]
        experts = (tuple(Origin(expert) for expert in range(moe.num_experts)),) * _num_moe_layers(config)
        limits, note = (1, 1), "experts keep their logical numbers: no record of an import gives those in a base model"
        if record is not None:
            limits, note = self.limits_of(record), ""
            experts = tuple(
                tuple(None if origin is None else Origin(*origin) for origin in layer) for layer in record["origins"]
            )
        num_experts = 1 + max(origin.expert for origin in experts[0] if origin is not None)
        foreign = self._foreign(config, num_experts, moe.groups[0].moe_router_topk, *limits)
        kept = {place for place, origin in enumerate(experts[0]) if origin is not None and not origin.copy}
        same_text = kept == set(ExpertGroups.from_config(moe).choices[0])
        return Target(foreign, Correspondence(experts, self.ids(config.vocab, foreign.vocab_size)), same_text, note)

    def _foreign(self, config: RunConfig, num_experts: int, top_k: int, n_group: int, topk_group: int) -> ForeignModel:
        foreign = ForeignModel(
            {},
            config.vocab.text_vocab_size,
            num_experts=num_experts,
            top_k=top_k,
            n_group=n_group,
            topk_group=topk_group,
        )
        self.require_holds(config, foreign)
        return foreign


class Dense(Architecture):
    """A base without experts: its MLP becomes every expert, and the shared one."""

    modes = ("upcycle",)
    rules = (*COMMON, *UPCYCLED)
    fields: tuple[Field, ...] = GROUPED_QUERY
    has = {"first_k_dense_replace": 0, "attention": {"type": "gqa"}}
    derived = {
        "moe.moe_ffn_hidden_size": lambda config: config.integer("intermediate_size"),
        "moe.moe_shared_expert_intermediate_size": lambda config: config.integer("intermediate_size"),
    }
    free = ("init_method_std", "first_k_dense_replace", "moe.moe_shared_expert_intermediate_size")

    def target(self, config: RunConfig, experts: str, record: dict[str, Any] | None) -> Target:
        """The dense model whose MLP all experts are, as after upcycling. That they are is checked tensor by tensor."""
        moe = config.model.moe
        width = moe.moe_ffn_hidden_size
        require({
            "model.moe.norm_topk_prob": (moe.norm_topk_prob, "gates must sum to 1"),
            "model.moe.moe_router_topk_scaling_factor": (
                moe.moe_router_topk_scaling_factor == 1,
                "gates must sum to 1",
            ),
            "model.moe.moe_shared_expert_intermediate_size": (
                moe.moe_shared_expert_intermediate_size in (0, width),
                "the shared expert must have the width of the dense MLP, or be absent",
            ),
        })  # fmt: skip
        foreign = ForeignModel({}, config.vocab.text_vocab_size)
        self.require_holds(config, foreign)
        experts_of_layer = (Origin(0),) * moe.num_experts
        return Target(
            foreign,
            Correspondence((experts_of_layer,) * _num_moe_layers(config), self.ids(config.vocab, foreign.vocab_size)),
        )


def _num_moe_layers(config: RunConfig) -> int:
    return config.model.num_layers - config.model.first_k_dense_replace
