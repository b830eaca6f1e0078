"""What an import will write, and out of what: settled and checked before a byte is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_most.checkpointing.region_io import Region, TensorForm
from megatron_most.config import RunConfig
from megatron_most.config.load import build_config
from megatron_most.conversion import hf_format
from megatron_most.conversion.architectures import Architecture, ForeignModel, read_foreign
from megatron_most.conversion.experts import origins, read_usage
from megatron_most.conversion.extension import EXTENSION, Extension
from megatron_most.conversion.hugging_face import CONFIG, HuggingFaceModel
from megatron_most.conversion.import_config import ImportOptions, import_config, import_mode
from megatron_most.conversion.native import EMBEDDING, EXPERT_BIAS, HEAD, native_shapes
from megatron_most.conversion.new_weights import NewWeights, RowDistribution, generator
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
    fresh: NewWeights
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
    _check_counts(source, foreign)
    extension = Extension.read(source) if options.experts is None else None
    mode = import_mode(architecture, extension is not None, options)
    if not 0 <= options.noise <= 1:
        raise ConfigError(f"--noise={options.noise}: must be a share of the weights' size, from 0 to 1")
    if options.noise and mode != "expand":
        raise ConfigError(f"--noise={options.noise}: is for --experts expand, which makes copies")
    if options.usage is not None and mode not in ("partition", "expand"):
        raise ConfigError("--usage: is for --experts partition and expand")
    if extension is not None:
        config = build_config(f"{source.directory}: extension", extension.config, options.overrides)
        extension.check(config)
        both = extension.both
    elif architecture.name == hf_format.NAME:
        config = hf_format.run_config(source, options.overrides)
        both = hf_format.correspondence(config)
    else:
        config = import_config(source, architecture, foreign, mode, options)
        both = _correspondence(mode, config, foreign, options)
    rules = architecture.rules_for(foreign.tied)
    # What an export did not read, because it may differ from what is in the model, is in the extension.
    whole = [block for block in all_blocks(rules, config, both) if extension is None or not block.copy]
    unused = _check_tensors(source, architecture, foreign, whole)
    blocks = [piece for block in whole for piece in cut_block(block)]
    shapes = native_shapes(config)
    if extension is None and source.path_of(EXTENSION).is_file():
        unused[EXTENSION] = "--experts is given"
    kept = {} if extension is None else extension.regions
    sources: dict[Region, Block | str | None] = {block.region: block for block in blocks}
    sources |= {region: name for name, region in kept.items()}
    try:
        rest = open_regions(shapes, [*(block.region for block in blocks), *kept.values()])
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
    fresh = NewWeights(config, options.seed, embedding, head)
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


def _correspondence(mode: str, config: RunConfig, foreign: ForeignModel, options: ImportOptions) -> Correspondence:
    num_moe_layers = config.model.num_layers - config.model.first_k_dense_replace
    vocab = config.vocab
    if mode == "as they are":
        experts = (tuple(Origin(expert) for expert in range(foreign.num_experts)),) * num_moe_layers
        return Correspondence(experts, most_ids(vocab, foreign.vocab_size))
    usage = None if options.usage is None else read_usage(options.usage, foreign, num_moe_layers, vocab.modality_names)
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


def _check_counts(source: HuggingFaceModel, foreign: ForeignModel) -> None:
    """Raise where the configuration counts what the files cannot hold: laying out a billion layers would never end."""
    sizes = [size for entry in source.tensors.values() for size in entry.shape]
    counts = {
        "num_hidden_layers": (foreign.model["num_layers"], len(source.tensors)),
        "n_routed_experts": (foreign.num_experts, len(source.tensors)),
        "num_key_value_heads": (foreign.model["attention"].get("num_query_groups", 0), max(sizes, default=0)),
    }
    for name, (count, most) in counts.items():
        if count > most:
            raise CheckpointError(f"{source.path_of(CONFIG)}: {name}={count}: the files hold no more than {most}")


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
    for layer in range(config.model.first_k_dense_replace, config.model.num_layers):
        dtypes.setdefault(EXPERT_BIAS.format(layer=layer), torch.float32)
    return {key: TensorForm(shape, dtypes.get(key, dtypes[EMBEDDING])) for key, shape in shapes.items()}
