"""What an export will write, and whether the format can hold the model at all."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_most.checkpointing import CheckpointMetadata, read_metadata, resolve
from megatron_most.checkpointing.region_io import STATE, Region, StateReader, TensorForm
from megatron_most.config import RunConfig
from megatron_most.config.load import build_config
from megatron_most.conversion import hf_format
from megatron_most.conversion.architectures import BY_NAME, Architecture, ForeignModel
from megatron_most.conversion.extension import Extension, shape_config
from megatron_most.conversion.hugging_face import is_finite, read_json
from megatron_most.conversion.import_plan import RECORD, most_ids
from megatron_most.conversion.native import EMBEDDING, EXPERT_BIAS, native_shapes
from megatron_most.conversion.weight_map import Block, Correspondence, IdRun, Origin, all_blocks, cut, open_regions
from megatron_most.errors import CheckpointError, ConfigError
from megatron_most.moe import ExpertGroups

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class ExportPlan:
    """Everything about one export.

    Args:
        blocks: foreign tensor -> the blocks that say what its rows are; where several speak of the same rows, they
            must agree.
        forms: foreign tensors, as they will be written.
        extension: what the format has no place for; None where nothing is left or it is not wanted.
        left_out: what is in no file, and why.
        same_text: text computes in the exported model what it does in this one.
        note: what the user should know about the numbers of experts; empty for nothing.
    """

    checkpoint: Path
    config: RunConfig
    architecture: Architecture
    foreign: ForeignModel
    both: Correspondence
    reader: StateReader
    blocks: dict[str, list[Block]]
    forms: dict[str, TensorForm]
    extension: Extension | None
    extension_forms: dict[str, TensorForm]
    same_text: bool
    note: str = ""
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def state(self) -> Path:
        return self.checkpoint / STATE

    def produce(self, name: str) -> torch.Tensor:
        """A foreign tensor. Raises :class:`CheckpointError` where the format has one place for what differs here."""
        form, blocks = self.forms[name], self.blocks[name]
        result = torch.empty(form.shape, dtype=self.reader.forms[blocks[0].region.key].dtype)
        written: dict[tuple[int, int], Block] = {}
        for block in blocks:
            rows = result[block.row : block.row + block.rows]
            first = written.setdefault((block.row, block.rows), block)
            part = self.reader.read(block.region, rows.view(block.region.sizes) if first is block else None)
            part = part.view(block.shape)
            if not is_finite(part):
                raise CheckpointError(f"{self.checkpoint}: {block.region.key} holds values that are not finite")
            if block.scale != 1:
                part /= block.scale
            if first is not block and not torch.equal(rows, part):
                raise CheckpointError(
                    f"{self.checkpoint}: {self.architecture.name} has one {name} for what differs here:"
                    f" {_place(first)} and {_place(block)}"
                )
        return result.to(form.dtype)

    def produce_extension(self, name: str) -> torch.Tensor:
        return self.reader.read(self.extension.regions[name]).to(self.extension_forms[name].dtype)


def plan_export(
    path: str | Path, name: str, dtype: str | None, experts: str = "text", with_extension: bool = True
) -> ExportPlan:
    """Settle what is written.

    Args:
        path: a native checkpoint, or a run directory for its newest.
        name: of the format.
        dtype: of the weights; None as they are stored.
        experts: for DeepSeek-V2, ``text`` for those that text may choose, or ``all``, which undoes a partition.
        with_extension: keep what the format has no place for in files beside the model.

    Raises:
        ConfigError: the format cannot hold this model.
        CheckpointError: the checkpoint is missing or broken.
    """
    directory = resolve(path)
    metadata = read_metadata(directory)
    config = stored_config(directory, metadata)
    architecture = BY_NAME[name]
    if experts == "all" and name != "deepseek-v2":
        raise ConfigError(f"--experts=all: is for --format deepseek-v2, not {name}")
    reader = StateReader(directory / STATE)
    shapes = native_shapes(config)
    forms = reader.forms
    for key, shape in shapes.items():
        if key not in forms or forms[key].shape != shape:
            found = list(forms[key].shape) if key in forms else "missing"
            raise CheckpointError(f"{directory}: {key} is {found}, the configuration says {list(shape)}")
    same_text, note = True, ""
    if name == "most":
        foreign, both = _as_most(config)
    elif name == "llama":
        foreign, both = _as_llama(config)
    elif name == hf_format.NAME:
        foreign = dataclasses.replace(_foreign(config, config.model.moe.num_experts, 1, 1, 1), has_audio_ids=True)
        both = hf_format.correspondence(config)
    elif experts == "all":
        record = _import_record(directory, config)
        foreign, both = _as_whole_base(config, record)
        if record is None:
            note = f"experts keep their logical numbers: no {RECORD} says which of a base they were"
        kept = {place for place, origin in enumerate(both.experts[0]) if origin is not None and not origin.copy}
        same_text = kept == set(ExpertGroups.from_config(config.model.moe).choices[0])
    else:
        foreign, both = _as_text_model(config)
    precision = dtype or ("fp32" if forms[EMBEDDING].dtype == torch.float32 else "bf16")
    foreign = dataclasses.replace(foreign, precision=precision)
    by_name: dict[str, list[Block]] = {}
    for block in all_blocks(architecture.rules_for(tied=False), config, both):
        if not block.copy:
            by_name.setdefault(block.name, []).append(block)
    exported: dict[str, TensorForm] = {}
    for tensor, blocks in by_name.items():
        shape = (max(block.row + block.rows for block in blocks), *blocks[0].shape[1:])
        stored = forms[blocks[0].region.key].dtype
        exported[tensor] = TensorForm(shape, _written_dtype(blocks[0].region, stored, dtype))
    covered = [block.region for blocks in by_name.values() for block in blocks]
    rest = [piece for region in open_regions(shapes, covered) for piece in cut(region)]
    regions = {_region_name(region): region for region in rest}
    values = {**shape_config(config), "tokenizer": None, "codec": config.codec}
    extension = Extension(values, both, regions) if regions and with_extension else None
    left_out = {} if with_extension else {name: "not wanted" for name in regions}
    return ExportPlan(
        checkpoint=directory,
        config=config,
        architecture=architecture,
        foreign=foreign,
        both=both,
        reader=reader,
        blocks=by_name,
        forms=exported,
        extension=extension,
        extension_forms={
            name: TensorForm(region.sizes, _written_dtype(region, forms[region.key].dtype, dtype))
            for name, region in (regions if extension is not None else {}).items()
        },
        same_text=same_text,
        note=note,
        left_out=left_out,
    )


def _import_record(directory: Path, config: RunConfig) -> dict[str, Any] | None:
    """What was written by the import that made a checkpoint, or the one whose weights its run started from."""
    places = [directory, *([Path(config.checkpoint.load)] if config.checkpoint.load else [])]
    found = next((place / RECORD for place in places if (place / RECORD).is_file()), None)
    return None if found is None else read_json(found)


def _written_dtype(region: Region, stored: torch.dtype, wanted: str | None) -> torch.dtype:
    """The wanted one, alike for the parts of a tensor; the biases that steer the choice of experts stay as they are."""
    is_bias = region.key.endswith(EXPERT_BIAS.rpartition("{layer}")[2])
    return stored if wanted is None or is_bias else DTYPES[wanted]


def stored_config(directory: Path, metadata: CheckpointMetadata) -> RunConfig:
    """The configuration of a checkpoint, for one process."""
    values = {name: section for name, section in metadata.config.items() if name not in ("parallel", "data")}
    values["data"] = {"seq_length": metadata.config["data"]["seq_length"]}
    return build_config(
        str(directory), values, ["training.micro_batch_size=1", "model.moe.moe_token_dispatcher_type=alltoall"]
    )


def _as_text_model(config: RunConfig) -> tuple[ForeignModel, Correspondence]:
    """DeepSeek-V2 with the experts that text may choose: computes what text computes here."""
    moe = config.model.moe
    _require_deepseek(config)
    if moe.score_rule == "all":
        raise ConfigError(
            "model.moe.score_rule='all': text's gates depend on all experts' scores; deepseek-v2 has no place for"
            " experts that only take part in them"
        )
    text = moe.groups[0]
    choice = ExpertGroups.from_config(moe).choices[0]
    places = {expert: Origin(place) for place, expert in enumerate(choice)}
    experts = tuple(places.get(expert) for expert in range(moe.num_experts))
    foreign = _foreign(
        config, len(choice), text.moe_router_topk, text.moe_router_num_groups, text.moe_router_group_topk
    )
    return foreign, _both(config, experts)


def _as_whole_base(config: RunConfig, record: dict[str, Any] | None) -> tuple[ForeignModel, Correspondence]:
    """DeepSeek-V2 with every expert, numbered as in the base it was made from."""
    moe = config.model.moe
    _require_deepseek(config)
    if moe.router_weights == "per_modality":
        raise ConfigError("model.moe.router_weights='per_modality': deepseek-v2 has one router for all experts")
    layers = config.model.num_layers - config.model.first_k_dense_replace
    experts = (tuple(Origin(expert) for expert in range(moe.num_experts)),) * layers
    limits = (1, 1)
    if record is not None:
        experts = tuple(
            tuple(None if origin is None else Origin(*origin) for origin in layer) for layer in record["origins"]
        )
        source = record["source_config"]
        if source.get("topk_method") == "group_limited_greedy":
            limits = (source["n_group"], source["topk_group"])
    num_experts = 1 + max(origin.expert for origin in experts[0] if origin is not None)
    foreign = _foreign(config, num_experts, moe.groups[0].moe_router_topk, *limits)
    return foreign, Correspondence(experts, _text_ids(config))


def _as_most(config: RunConfig) -> tuple[ForeignModel, Correspondence]:
    moe = config.model.moe
    _require_deepseek(config)
    names = [group.modality for group in moe.groups]
    rules = {
        "vocab.further_modalities": (len(names) == 2, "most has text and audio alone"),
        "model.moe.score_rule": (moe.score_rule == "all", "most takes the softmax over all experts (score_rule=all)"),
        "model.moe.router_weights": (moe.router_weights == "shared", "most has one router for both modalities"),
        "model.moe.groups.moe_router_topk": (
            len({group.moe_router_topk for group in moe.groups}) == 1,
            "most has one moe_router_topk",
        ),
        "model.moe.groups.moe_router_num_groups": (
            all(group.moe_router_num_groups == 1 for group in moe.groups),
            "most limits no groups",
        ),
    }
    _require(rules)
    vocab = config.vocab
    vocab_size = vocab.text_vocab_size + vocab.codec_layout.num_ids + 3
    choices = ExpertGroups.from_config(moe).choices
    foreign = _foreign(config, moe.num_experts, moe.groups[0].moe_router_topk, 1, 1)
    foreign = dataclasses.replace(foreign, vocab_size=vocab_size, choices=choices)
    experts = tuple(Origin(expert) for expert in range(moe.num_experts))
    return foreign, dataclasses.replace(_both(config, experts), ids=most_ids(vocab, vocab_size))


def _as_llama(config: RunConfig) -> tuple[ForeignModel, Correspondence]:
    """The dense model of which all experts are the MLP, as after upcycling; anything else is found at its tensors."""
    model, moe = config.model, config.model.moe
    width = moe.moe_ffn_hidden_size
    shared = moe.moe_shared_expert_intermediate_size in (0, width)
    rules = {
        "model.attention.type": (model.attention.type == "gqa", "llama has grouped-query attention (gqa)"),
        "model.moe.norm_topk_prob": (moe.norm_topk_prob, "gates that do not sum to 1 leave no dense MLP"),
        "model.moe.moe_router_topk_scaling_factor": (moe.moe_router_topk_scaling_factor == 1, "gates must sum to 1"),
        "model.moe.moe_ffn_hidden_size": (
            width == model.ffn_hidden_size,
            "must be model.ffn_hidden_size, all are one MLP",
        ),
        "model.moe.moe_shared_expert_intermediate_size": (shared, "the shared expert must be the dense MLP, too"),
    }
    _require(rules)
    foreign = _foreign(config, 0, 1, 1, 1)
    return foreign, _both(config, (Origin(0),) * moe.num_experts)


def _require_deepseek(config: RunConfig) -> None:
    model, moe = config.model, config.model.moe
    shared, width = moe.moe_shared_expert_intermediate_size, moe.moe_ffn_hidden_size
    rules = {
        "model.attention.type": (model.attention.type == "mla", "the format has multi-latent attention (mla)"),
        "model.moe.moe_router_score_function": (
            moe.moe_router_score_function == "softmax",
            "the format has softmax scores",
        ),
        "model.moe.moe_router_bias_update_rate": (
            moe.moe_router_bias_update_rate == 0,
            "the format has no place for the biases that steer the choice of experts",
        ),
        "model.moe.moe_shared_expert_intermediate_size": (
            shared > 0 and shared % width == 0,
            f"the format has shared experts of the routed ones' width, {width}",
        ),
        "model.layernorm_epsilon": (model.layernorm_epsilon == 1e-6, "the format has 1e-6 in some norms"),
        "model.moe.norm_topk_prob": (not moe.norm_topk_prob, "implementations of the format disagree on it"),
    }
    _require(rules)


def _require(rules: dict[str, tuple[bool, str]]) -> None:
    for name, (holds, rule) in rules.items():
        if not holds:
            raise ConfigError(f"{name}: cannot be exported: {rule}")


def _foreign(config: RunConfig, num_experts: int, top_k: int, n_group: int, topk_group: int) -> ForeignModel:
    return ForeignModel({}, config.vocab.text_vocab_size, "fp32", False, num_experts, top_k, n_group, topk_group)


def _both(config: RunConfig, experts: tuple[Origin | None, ...]) -> Correspondence:
    layers = config.model.num_layers - config.model.first_k_dense_replace
    return Correspondence((experts,) * layers, _text_ids(config))


def _text_ids(config: RunConfig) -> tuple[IdRun, ...]:
    return (IdRun(0, 0, config.vocab.text_vocab_size),)


def _region_name(region: Region) -> str:
    """``key[expert, first row]``, unique as regions do not overlap."""
    return f"{region.key}[{','.join(map(str, region.offsets[: max(1, len(region.offsets) - 1)]))}]"


def _place(block: Block) -> str:
    return f"{block.region.key}[{block.region.offsets[0]}]" if len(block.region.sizes) == 3 else block.region.key
