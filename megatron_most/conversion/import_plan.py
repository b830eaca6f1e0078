"""What an import will write, and out of what: settled and checked before a byte is written."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_most.checkpointing.metadata import first_difference
from megatron_most.checkpointing.streaming import Region, TensorForm
from megatron_most.config import RunConfig
from megatron_most.config.load import build_config
from megatron_most.conversion.architectures import Architecture, ForeignModel, read_foreign
from megatron_most.conversion.experts import default_groups, most_groups, origins, read_usage
from megatron_most.conversion.extension import Extension
from megatron_most.conversion.fresh import FreshWeights, RowDistribution, generator
from megatron_most.conversion.hugging_face import CONFIG, HuggingFaceModel
from megatron_most.conversion.native import EMBEDDING, EXPERT_BIAS, HEAD, native_shapes
from megatron_most.conversion.weight_map import (
    Block,
    Correspondence,
    IdRun,
    Origin,
    all_blocks,
    cut,
    cut_block,
    open_regions,
)
from megatron_most.errors import CheckpointError, ConfigError
from megatron_most.vocab import VocabLayout

RECORD = "conversion.json"
"""What an import did, in the checkpoint."""

MOST_TEXT_IDS = 100002
MOST_AUDIO_UNITS = 500
"""Of the published MoST checkpoints: text ids, then one id for each unit, begin and end of audio."""


@dataclass(frozen=True)
class ImportOptions:
    """What the user asks for.

    Args:
        experts: ``partition``, ``expand`` or ``upcycle``; None for a model that has expert groups already.
        audio_vocab: ``layout:codebooksxsize``, as ``frame:4x4032``.
        config: YAML file with sections of a run configuration.
        overrides: ``section.key=value``.
        usage: JSON file with how often experts are used.
        noise: standard deviation of the noise on copied experts, as a share of the weights' root mean square.
        seed: of new weights and noise.
        allow_pickle: read ``pytorch_model.bin``.
    """

    experts: str | None = None
    audio_vocab: str | None = None
    config: str | None = None
    overrides: Sequence[str] = ()
    usage: str | None = None
    noise: float = 0.0
    seed: int = 1234
    allow_pickle: bool = False


@dataclass
class ImportPlan:
    """Everything about one import.

    Args:
        config: of the model that is made.
        both: experts and ids that correspond.
        forms: every native tensor.
        sources: every region to write, and what it is made of: a block, a tensor of the extension, or new weights.
        unused: what of the source is left aside, and why.
    """

    source: HuggingFaceModel
    architecture: Architecture
    foreign: ForeignModel
    mode: str
    config: RunConfig
    both: Correspondence
    forms: dict[str, TensorForm]
    sources: dict[Region, Block | str | None]
    fresh: FreshWeights
    extension: Extension | None
    noise: float
    seed: int
    unused: dict[str, str] = field(default_factory=dict)

    @property
    def regions(self) -> list[Region]:
        return list(self.sources)

    @property
    def drawn(self) -> list[str]:
        """Keys of which some weights are new."""
        return list(dict.fromkeys(region.key for region, made_of in self.sources.items() if made_of is None))

    @property
    def num_bytes(self) -> int:
        return sum(num_bytes(region, self.forms) for region in self.sources)

    def produce(self, region: Region) -> torch.Tensor:
        """The tensor of a region."""
        made_of, dtype = self.sources[region], self.forms[region.key].dtype
        if made_of is None:
            return self.fresh.draw(region, dtype)
        if isinstance(made_of, str):
            return self.extension.source.read(made_of)
        tensor = self.source.read(made_of.name, made_of.row, made_of.rows)
        if made_of.scale != 1:
            tensor = tensor * made_of.scale
        if made_of.copy and self.noise:
            noise = torch.randn(tensor.shape, generator=generator(self.seed, region))
            values = tensor.float()
            tensor = (values + noise * (self.noise * values.square().mean().sqrt())).to(dtype)
        return tensor.reshape(region.sizes)


def num_bytes(region: Region, forms: dict[str, TensorForm]) -> int:
    return torch.Size(region.sizes).numel() * forms[region.key].dtype.itemsize


def plan_import(directory: str | Path, options: ImportOptions) -> ImportPlan:
    """Read the source's configuration and headers and settle everything.

    Raises:
        ConfigError: the wish makes no sense for this source.
        CheckpointError: the source is broken or cannot be converted.
    """
    source = HuggingFaceModel(directory, options.allow_pickle)
    architecture, foreign = read_foreign(source.config, str(source.path_of(CONFIG)))
    extension = Extension.read(source) if options.experts is None else None
    mode = _mode(architecture, extension, options)
    if options.noise < 0 or (options.noise and mode != "expand"):
        raise ConfigError(f"--noise={options.noise}: must not be negative, and is for --experts expand")
    if options.usage is not None and mode not in ("partition", "expand"):
        raise ConfigError("--usage: is for --experts partition and expand")
    if extension is not None:
        config = build_config(f"{source.directory}: extension", extension.config, options.overrides)
        extension.check(config)
        both = extension.both
    else:
        config = _config(source, architecture, foreign, mode, options)
        both = _correspondence(mode, config, foreign, options)
    rules = architecture.rules_for(foreign.tied)
    # What an export did not read, because it may differ from what is in the model, is in the extension.
    blocks = [
        piece
        for block in all_blocks(rules, config, both)
        if extension is None or not block.copy
        for piece in cut_block(block)
    ]
    shapes = native_shapes(config)
    unused = _check_tensors(source, architecture, foreign, blocks)
    sources: dict[Region, Block | str | None] = {block.region: block for block in blocks}
    if extension is not None:
        sources |= {region: name for name, region in extension.regions.items()}
    try:
        rest = open_regions(shapes, sources)
    except ValueError as error:
        raise CheckpointError(f"{source.directory}: {error}") from None
    forms = _forms(source, shapes, blocks, config, extension)
    # New rows are drawn from the distribution of the base's text ids.
    num_text_ids = min(config.vocab.text_vocab_size, foreign.vocab_size)
    heads = next(block.name for block in blocks if block.region.key == HEAD)
    embedding, head = (
        RowDistribution.of(lambda start, rows, name=name: source.read(name, start, rows), num_text_ids)
        for name in (next(block.name for block in blocks if block.region.key == EMBEDDING), heads)
    )
    fresh = FreshWeights(config, options.seed, embedding, head)
    for region in rest:
        if not fresh.covers(region):
            raise CheckpointError(f"{source.directory}: holds nothing for {region.key}")
        sources |= dict.fromkeys(cut(region))
    place = {key: index for index, key in enumerate(shapes)}
    sources = dict(sorted(sources.items(), key=lambda item: (place[item[0].key], item[0].offsets)))
    return ImportPlan(
        source=source,
        architecture=architecture,
        foreign=foreign,
        mode=mode,
        config=config,
        both=both,
        forms=forms,
        sources=sources,
        fresh=fresh,
        extension=extension,
        noise=options.noise,
        seed=options.seed,
        unused=unused,
    )


def _mode(architecture: Architecture, extension: Extension | None, options: ImportOptions) -> str:
    valid = {"deepseek-v2": ("partition", "expand"), "llama": ("upcycle",), "most": ()}[architecture.name]
    if extension is not None:
        if options.config is not None or options.audio_vocab is not None:
            raise ConfigError("--config, --audio-vocab: the extension beside the model says what it is; give --experts"
                              " to take the model without it")  # fmt: skip
        return "extension"
    if options.experts is None:
        if valid:
            raise ConfigError(f"--experts: a {architecture.name} model needs one of {', '.join(valid)}")
        return "as they are"
    if options.experts not in valid:
        rule = f"must be {' or '.join(valid)}" if valid else "leave it out, the model has its groups"
        raise ConfigError(f"--experts={options.experts}: for a {architecture.name} model {rule}")
    return options.experts


def _config(
    source: HuggingFaceModel, architecture: Architecture, foreign: ForeignModel, mode: str, options: ImportOptions
) -> RunConfig:
    wanted = _read_yaml(options.config) if options.config else {}
    values: dict[str, Any] = {
        "model": copy.deepcopy(foreign.model),
        "training": {"precision": foreign.precision},
        "vocab": _vocab(architecture, foreign, options.audio_vocab, wanted.get("vocab")),
    }
    moe = values["model"]["moe"]
    if architecture.name == "most":
        moe |= most_groups(foreign)
    if mode == "upcycle":
        moe["normalize_top_k"] = True
    _merge(values, wanted)
    if "groups" not in moe:
        names = VocabLayout(**values["vocab"]).modality_names
        moe["groups"] = default_groups(mode, foreign, names, options.usage is not None)
    config = build_config(options.config or str(source.directory), values, options.overrides)
    fixed = {**foreign.model, "moe": {**foreign.model["moe"]}}
    for name in ("init_std", *(("num_dense_layers",) if mode == "upcycle" else ())):
        del fixed[name]
    if mode == "upcycle":
        del fixed["moe"]["shared_ffn_hidden_size"]
    mine = asdict(config)["model"]
    difference = first_difference(fixed, _only(mine, fixed), "model")
    if difference:
        name, theirs, ours = difference
        raise ConfigError(f"{name}={ours!r}: {source.directory} has {theirs!r}")
    if architecture.name == "most":
        groups = [group["experts"] for group in moe["groups"]]
        if [group.experts for group in config.model.moe.groups] != groups:
            raise ConfigError(f"model.moe.groups: {source.directory} has its own, {groups}")
    return config


def _vocab(
    architecture: Architecture, foreign: ForeignModel, audio_vocab: str | None, wanted: dict[str, Any] | None
) -> dict[str, Any]:
    """The default of the ``vocab`` section."""
    if audio_vocab is not None:
        try:
            layout, _, sizes = audio_vocab.partition(":")
            num_codebooks, codebook_size = map(int, sizes.split("x"))
        except ValueError:
            raise ConfigError(f"--audio-vocab={audio_vocab}: must be LAYOUT:CODEBOOKSxSIZE, as frame:4x4032") from None
        if wanted and {"layout", "num_codebooks", "codebook_size"} & wanted.keys():
            raise ConfigError("--audio-vocab: the --config file has a vocab section, too; give one of them")
        audio = {"layout": layout, "num_codebooks": num_codebooks, "codebook_size": codebook_size}
    elif architecture.name == "most":
        audio = {"layout": "flat", "num_codebooks": 1, "codebook_size": MOST_AUDIO_UNITS}
    elif wanted:
        audio = {}
    else:
        raise ConfigError("--audio-vocab: is needed, or a vocab section in the --config file")
    text = MOST_TEXT_IDS if architecture.name == "most" else foreign.vocab_size
    return {"text_vocab_size": text, **audio}


def _correspondence(mode: str, config: RunConfig, foreign: ForeignModel, options: ImportOptions) -> Correspondence:
    num_moe_layers = config.model.num_layers - config.model.num_dense_layers
    vocab = config.vocab
    if mode == "as they are":
        experts = (tuple(Origin(expert) for expert in range(foreign.num_experts)),) * num_moe_layers
        return Correspondence(experts, most_ids(vocab, foreign.vocab_size))
    usage = None if options.usage is None else read_usage(options.usage, foreign, num_moe_layers)
    ids = (IdRun(0, 0, min(vocab.text_vocab_size, foreign.vocab_size)),)
    return Correspondence(origins(mode, config, foreign, usage), ids)


def most_ids(vocab: VocabLayout, vocab_size: int) -> tuple[IdRun, ...]:
    """The MoST format puts units before begin and end of audio; the ``frame`` id takes a padding row behind them.

    Raises:
        ConfigError: the layout does not fit the ids there are.
    """
    text, num_units = vocab.text_vocab_size, vocab.codec_layout.num_ids
    behind = text + num_units
    if behind + 2 > vocab_size:
        raise ConfigError(
            f"vocab: {text} text ids, {num_units} units and 2 more need {behind + 2} ids, the model has {vocab_size}"
        )
    runs = [IdRun(0, 0, text), IdRun(vocab.begin_of_audio, behind, 2)]
    if num_units:
        runs.append(IdRun(vocab.frame + 1, text, num_units))
    if behind + 2 < vocab_size:
        runs.append(IdRun(vocab.frame, behind + 2, 1))
    return tuple(runs)


def _check_tensors(
    source: HuggingFaceModel, architecture: Architecture, foreign: ForeignModel, blocks: list[Block]
) -> dict[str, str]:
    """Every tensor of the source is needed, or known to be left aside; all have the shapes the configuration says."""
    rows: dict[str, int] = {}
    for block in blocks:
        rows[block.name] = max(rows.get(block.name, 0), block.row + block.rows)
    unused = {}
    for block in {block.name: block for block in blocks}.values():
        entry = source.tensors.get(block.name)
        if entry is None:
            raise CheckpointError(f"{source.directory}: tensor {block.name} is missing")
        along_ids = block.region.key in (EMBEDDING, HEAD)
        shape = (foreign.vocab_size if along_ids else rows[block.name], *block.shape[1:])
        if entry.shape != shape:
            raise CheckpointError(
                f"{source.directory}: tensor {block.name} has shape {list(entry.shape)}, the configuration says"
                f" {list(shape)}"
            )
        if rows[block.name] < shape[0]:
            unused[f"{block.name}[{rows[block.name]}:{shape[0]}]"] = "ids that the vocabulary layout leaves out"
    for name in sorted(source.tensors.keys() - rows.keys()):
        reason = architecture.reason_unused(name, foreign.tied)
        if reason is None:
            raise CheckpointError(
                f"{source.directory / source.tensors[name].file}: tensor {name} has no place in a"
                f" {architecture.name} model"
            )
        unused[name] = reason
    return unused


def _forms(
    source: HuggingFaceModel,
    shapes: dict[str, tuple[int, ...]],
    blocks: list[Block],
    config: RunConfig,
    extension: Extension | None,
) -> dict[str, TensorForm]:
    """Each tensor keeps its type; those that are new take the embedding's."""
    made_of = [(block.region.key, block.name, source.tensors[block.name].dtype) for block in blocks]
    if extension is not None:
        tensors = extension.source.tensors
        made_of += [(region.key, name, tensors[name].dtype) for name, region in extension.regions.items()]
    dtypes: dict[str, torch.dtype] = {}
    for key, name, dtype in made_of:
        if dtypes.setdefault(key, dtype) != dtype:
            raise CheckpointError(
                f"{source.directory}: tensor {name} is {dtype}, others that go into {key} are {dtypes[key]}"
            )
    for layer in range(config.model.num_dense_layers, config.model.num_layers):
        dtypes.setdefault(EXPERT_BIAS.format(layer=layer), torch.float32)
    return {key: TensorForm(shape, dtypes.get(key, dtypes[EMBEDDING])) for key, shape in shapes.items()}


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise ConfigError(f"{path}: not readable as YAML: {reason}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold a mapping of config sections")
    return values


def _merge(values: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Put ``wanted`` over ``values``, section by section."""
    for key, value in wanted.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value


def _only(values: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """The entries of ``values`` that ``like`` has, too."""
    return {key: _only(values[key], entry) if isinstance(entry, dict) else values[key] for key, entry in like.items()}
