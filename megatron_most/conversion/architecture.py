"""What a foreign format is: one class, which reads and writes ``config.json`` and names the tensors.

:class:`Architecture` does what all formats have in common. A subclass for a base model lists the fields of its
``config.json`` beside the keys that mean the same, what all its models have, and the names of its tensors;
docs/adding-a-base.md shows one.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_most.checkpointing.metadata import first_difference
from megatron_most.config import RunConfig
from megatron_most.conversion.config_json import Config, Field, Values, max_positions, read_rope, write_rope
from megatron_most.conversion.tables import COMMON, HEAD_RULE, TIED_HEAD_RULE
from megatron_most.conversion.weight_map import Correspondence, IdRun, Rule
from megatron_most.errors import CheckpointError, ConfigError
from megatron_most.vocab import VocabLayout

_NOT_WEIGHTS = re.compile(r".*\.rotary_emb\.inv_freq")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_FIELDS = (
    Field("num_hidden_layers", "num_layers"),
    Field("hidden_size", "hidden_size"),
    Field("intermediate_size", "ffn_hidden_size"),
    Field("rms_norm_eps", "layernorm_epsilon", float),
    Field("initializer_range", "init_method_std", float),
    Field("num_attention_heads", "attention.num_attention_heads"),
)
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
}
"""What all formats that can be converted have in common, whether they have the field or not."""
_NEUTRAL: Mapping[str, Values] = {
    "gqa": {"attention": {"qk_layernorm": "none", "add_qkv_bias": False}, "moe": {"moe_shared_expert_gate": False}},
    "mla": {"moe": {"moe_shared_expert_gate": False}},
}
"""What a model with this attention has, where its format does not say otherwise (``Architecture.has``)."""
ABSENT: Values = {
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
}
_INERT = frozenset({
    "_name_or_path", "architectures", "auto_map", "transformers_version", "transformers.js_config",
    "attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "use_cache", "pretraining_tp",
    "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "output_router_logits",
    "router_aux_loss_coef", "output_attentions", "output_hidden_states", "return_dict", "unsloth_fixed",
    "unsloth_version", "is_llama_config",
})  # fmt: skip
"""Fields of any ``config.json`` that do not change what the weights compute."""


@dataclass(frozen=True)
class ForeignModel:
    """The shape of a foreign model.

    Args:
        model: the ``model`` section of a run configuration, without expert groups.
        vocab_size: number of rows of the embedding.
        dtype: the element type that ``config.json`` gives for the weights.
        tied: whether the output head is the embedding.
        num_experts: experts in each MoE layer; 0 in a dense model.
        top_k, n_group, topk_group: routing of the format, by its names.
        choices: the experts that text and audio may choose, for the MoST format only.
        architecture: name of its format.
    """

    model: Values
    vocab_size: int
    dtype: torch.dtype = torch.float32
    tied: bool = False
    num_experts: int = 0
    top_k: int = 1
    n_group: int = 1
    topk_group: int = 1
    choices: tuple[tuple[int, ...], ...] = ()
    architecture: str = ""


@dataclass(frozen=True)
class Target:
    """The foreign model that an export makes.

    Args:
        foreign: its shape.
        both: which experts and ids correspond.
        same_text: whether it computes for text what this model computes.
        note: what the user should know about the expert numbers; may be empty.
    """

    foreign: ForeignModel
    both: Correspondence
    same_text: bool = True
    note: str = ""


class Architecture:
    """A foreign format.

    Attributes:
        name: on the command line.
        model_types: its ``model_type`` in ``config.json``; the first one is written.
        transformers_class: what its classes in transformers begin with.
        modes: the values of ``--experts`` with which its models are imported; none for models that have groups.
        fields: what ``config.json`` says, beside the fields that all formats have.
        has: what every model of the format has, as a part of the ``model`` section.
        free: paths in the ``model`` section that the weights do not depend on: an import may set them otherwise.
        fixed: field -> the values that can be converted. Export writes the first one.
        inert: fields that change nothing, beside those of all formats.
        rules: the weight table, without the head.
        num_experts: the field that says how many experts a layer has, if there are any.
        derived: path in the ``model`` section -> a function that tells its value from the fields.
        absent: field -> what transformers takes where ``config.json`` does not say it.
        has_expert_bias: whether routers have biases that steer the choice of experts.
    """

    name: str
    model_types: tuple[str, ...]
    transformers_class: str = ""
    modes: tuple[str, ...] = ()
    fields: tuple[Field, ...] = ()
    has: Values = {}
    free: tuple[str, ...] = ("init_method_std",)
    fixed: Mapping[str, tuple[Any, ...]] = {}
    inert: frozenset[str] = frozenset()
    rules: tuple[Rule, ...] = COMMON
    num_experts: Field = Field("n_routed_experts", "")
    derived: Mapping[str, Callable[[Config], Any]] = {}
    absent: Values = ABSENT
    has_expert_bias: bool = False

    def read(self, config: Config) -> ForeignModel:
        """The shape of a model.

        Raises:
            CheckpointError: a field is missing, unknown, or has a value that cannot be converted.
        """
        config = dataclasses.replace(config, absent=self.absent)
        for name, allowed in {**_FIXED, **self.fixed}.items():
            config.require(name, *allowed)
        _require_whole_attention(config)
        model = copy.deepcopy(_merged(_NEUTRAL[self.has["attention"]["type"]], self.has))
        for field in (*_FIELDS, *self.fields):
            put(model, field.path, field.read(config))
        for path, value_of in self.derived.items():
            put(model, path, value_of(config))
        put(model, "attention.rope", read_rope(config))
        foreign = ForeignModel(model, **read_vocabulary(config), **self.read_routing(config))
        model["share_embeddings_and_output_weights"] = foreign.tied
        foreign = self.complete(config, foreign)
        config.refuse_unknown(f"a {self.name} model", {"model_type", *_INERT, *self.inert})
        return foreign

    def read_routing(self, config: Config) -> dict[str, Any]:
        """The arguments of :class:`ForeignModel` that are about experts."""
        return {}

    def write_routing(self, num_experts: int, top_k: int, n_group: int, topk_group: int) -> Values:
        """The fields that :meth:`read_routing` reads."""
        return {}

    def complete(self, config: Config, foreign: ForeignModel) -> ForeignModel:
        """``foreign`` with what fields alone do not say."""
        return foreign

    def write(self, config: RunConfig, foreign: ForeignModel) -> Values:
        """``config.json`` of the model that ``config`` becomes."""
        values = dataclasses.asdict(config.model)
        return {
            "architectures": [f"{self.transformers_class}ForCausalLM"],
            "model_type": self.model_types[0],
            "vocab_size": foreign.vocab_size,
            "max_position_embeddings": max_positions(config),
            "hidden_act": "silu",
            "tie_word_embeddings": config.model.share_embeddings_and_output_weights,
            "torch_dtype": str(foreign.dtype).removeprefix("torch."),
            **{name: allowed[0] for name, allowed in self.fixed.items()},
            **{field.name: get(values, field.path) for field in (*_FIELDS, *self.fields)},
            **write_rope(config.model.attention.rope),
            **self.write_routing(foreign.num_experts, foreign.top_k, foreign.n_group, foreign.topk_group),
        }

    def target(self, config: RunConfig, experts: str, record: dict[str, Any] | None) -> Target:
        """The foreign model that a checkpoint becomes.

        Args:
            experts: for formats with experts, ``text`` for those that text may choose, or ``all``.
            record: of the import that the weights come from, if it is there.

        Raises:
            ConfigError: the format cannot hold this model.
        """
        raise NotImplementedError

    def own_groups(self, foreign: ForeignModel) -> Values | None:
        """The expert groups that the model has: keys of ``model.moe``."""
        return None

    def default_vocab(self, foreign: ForeignModel) -> Values:
        """The ``vocab`` section of an import. Without a codec layout, the user has to give one."""
        return {"text_vocab_size": foreign.vocab_size}

    def ids(self, vocab: VocabLayout, vocab_size: int) -> tuple[IdRun, ...]:
        """The ids that a model and one of the format with ``vocab_size`` ids have in common."""
        return (IdRun(0, 0, min(vocab.text_vocab_size, vocab_size)),)

    def difference(self, foreign: ForeignModel, config: RunConfig) -> tuple[str, object, object] | None:
        """``(key, its value in foreign, in config)`` where the two models first differ; None if they are the same."""
        model, ours = copy.deepcopy(foreign.model), dataclasses.asdict(config.model)
        if ours["attention"]["latent_layernorm_epsilon"] == ours["layernorm_epsilon"]:
            ours["attention"]["latent_layernorm_epsilon"] = None
        # A tied head may become a head of its own, which starts equal.
        for path in (*self.free, *(["share_embeddings_and_output_weights"] if foreign.tied else [])):
            *sections, name = path.split(".")
            get(model, ".".join(sections)).pop(name, None)
        return first_difference(model, only(ours, model), "model")

    def require_holds(self, config: RunConfig, foreign: ForeignModel) -> None:
        """Raise :class:`ConfigError` unless ``config.json`` of the format describes the model of ``config``."""
        read = self.read(Config(self.write(config, foreign), self.name))
        difference = self.difference(read, config)
        if (read.n_group, read.topk_group) != (foreign.n_group, foreign.topk_group):
            raise ConfigError(
                f"model.moe.groups.moe_router_num_groups={foreign.n_group}: cannot be exported: a {self.name} model has"
                " no group limits"
            )
        if difference:
            name, theirs, ours = difference
            raise ConfigError(f"{name}={ours!r}: cannot be exported: a {self.name} model has {theirs!r}")

    def rules_for(self, tied: bool) -> tuple[Rule, ...]:
        return (*self.rules, TIED_HEAD_RULE if tied else HEAD_RULE)

    def reason_unused(self, name: str, foreign: ForeignModel) -> str | None:
        """Why a tensor that the table does not name may be ignored; None if it may not."""
        if _NOT_WEIGHTS.fullmatch(name):
            return "follows from the configuration"
        if foreign.tied and name in HEAD_RULE.foreign:
            return "tied to model.embed_tokens.weight"
        return None


def _require_whole_attention(config: Config) -> None:
    kinds = config.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or set(map(str, kinds)) - {"full_attention"}):
        raise CheckpointError(f"{config.source}: layer_types={kinds!r}: only 'full_attention' can be converted")


def read_vocabulary(config: Config) -> dict[str, Any]:
    """The arguments of :class:`ForeignModel` that all formats spell alike."""
    config.require("tie_word_embeddings", False, True, None)
    types = [str(config.get(name)).removeprefix("torch.") for name in ("dtype", "torch_dtype")]
    return {
        "vocab_size": config.integer("vocab_size"),
        "dtype": next((_DTYPES[name] for name in types if name in _DTYPES), torch.bfloat16),
        "tied": bool(config.get("tie_word_embeddings")),
    }


def require(rules: dict[str, tuple[bool, str]]) -> None:
    """Raise :class:`ConfigError` for the first of ``rules`` (key -> whether it holds, the rule) that does not hold."""
    for name, (holds, rule) in rules.items():
        if not holds:
            raise ConfigError(f"{name}: cannot be exported: {rule}")


def put(values: Values, path: str, value: Any) -> None:
    """Set the entry at a dotted ``path``."""
    *sections, name = path.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[name] = value


def get(values: Values, path: str) -> Any:
    """The entry at a dotted ``path``."""
    for name in filter(None, path.split(".")):
        values = values[name]
    return values


def _merged(values: Values, further: Values) -> Values:
    """``values`` with the entries of ``further``, section by section."""
    sections = {
        name: _merged(values[name], entry) for name, entry in further.items() if isinstance(values.get(name), dict)
    }
    return {**values, **further, **sections}


def only(values: Values, like: Values) -> Values:
    """The entries of ``values`` that are also in ``like``."""
    return {key: only(values[key], entry) if isinstance(entry, dict) else values[key] for key, entry in like.items()}
