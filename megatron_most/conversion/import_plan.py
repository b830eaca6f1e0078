"""Plans an import: what is written and from what, settled and checked before the first byte."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_most.checkpointing.regions import Region, TensorForm
from megatron_most.config import RunConfig
from megatron_most.config.load import build_config
from megatron_most.conversion import hf_format
from megatron_most.conversion.architecture import Architecture, ForeignModel
from megatron_most.conversion.architectures import read_foreign
from megatron_most.conversion.experts import origins, read_usage
from megatron_most.conversion.extension import EXTENSION, Extension
from megatron_most.conversion.hugging_face import CONFIG, HuggingFaceModel
from megatron_most.conversion.import_checks import check_counts, check_tensors, check_tied_head
from megatron_most.conversion.import_config import ImportOptions, import_config, import_mode
from megatron_most.conversion.native import EMBEDDING, EXPERT_BIAS, HEAD, is_expert_bias, native_shapes
from megatron_most.conversion.new_weights import NewWeights, RowDistribution, generator
from megatron_most.conversion.weight_map import (
    Block,
    Correspondence,
    Origin,
    all_blocks,
    cut,
    cut_block,
    open_regions,
)
from megatron_most.errors import CheckpointError

RECORD = "conversion.json"
"""The record of an import, in its checkpoint."""

Sources = dict[Region, Block | str | None]
"""Every native region to write -> the block it equals, the name of an extension's tensor, or None for new weights."""


@dataclass
class ImportPlan:
    """Everything that one import needs.

    Args:
        config: configuration of the imported model.
        both: which experts and ids correspond.
        forms: every native tensor.
        unused: part of the source that is not imported -> the reason.
    """

    source: HuggingFaceModel
    architecture: Architecture
    options: ImportOptions
    mode: str
    config: RunConfig
    both: Correspondence
    forms: dict[str, TensorForm]
    sources: Sources
    new_weights: NewWeights
    extension: Extension | None
    unused: dict[str, str]

    @property
    def regions(self) -> list[Region]:
        return list(self.sources)

    @property
    def drawn(self) -> list[str]:
        """Keys of the tensors that have new weights."""
        return list(dict.fromkeys(region.key for region, made_of in self.sources.items() if made_of is None))

    @property
    def num_bytes(self) -> int:
        return sum(num_bytes(region, self.forms) for region in self.sources)

    def produce(self, region: Region) -> torch.Tensor:
        """The tensor of a region. Raises :class:`CheckpointError` if the source has values that are not finite."""
        made_of, dtype = self.sources[region], self.forms[region.key].dtype
        if made_of is None:
            return self.new_weights.draw(region, dtype)
        if isinstance(made_of, str):
            assert self.extension is not None and self.extension.source is not None
            return self.extension.source.read(made_of)
        tensor = self.source.read(made_of.name, made_of.row, made_of.rows)
        if made_of.scale != 1:
            tensor = tensor.to(dtype) * made_of.scale
        if is_expert_bias(region.key):
            return tensor.to(dtype).reshape(region.sizes)  # a copy's too gets no noise
        if made_of.copy and self.options.noise:
            noise = torch.randn(tensor.shape, generator=generator(self.options.seed, region))
            values = tensor.float()
            tensor = (values + noise * (self.options.noise * values.square().mean().sqrt())).to(dtype)
        return tensor.reshape(region.sizes)


def num_bytes(region: Region, forms: dict[str, TensorForm]) -> int:
    return torch.Size(region.sizes).numel() * forms[region.key].dtype.itemsize


def plan_import(directory: str | Path, options: ImportOptions) -> ImportPlan:
    """Read the configuration and the file headers of the model in ``directory`` and plan its import.

    Raises:
        ConfigError: an option does not fit the model.
        CheckpointError: the model is broken or cannot be converted.
    """
    source = HuggingFaceModel(directory, options.allow_pickle)
    architecture, foreign = read_foreign(source.config, str(source.path_of(CONFIG)))
    check_counts(source, architecture, foreign)
    extension = Extension.read(source) if options.experts is None else None
    mode = import_mode(architecture, extension is not None, options)
    if extension is not None:
        config = build_config(f"{source.directory}: extension", extension.config, options.overrides)
        extension.check(config)
        both = extension.both
    elif architecture.name == hf_format.NAME:
        config = hf_format.run_config(source, options.overrides)
        both = hf_format.correspondence(config)
    else:
        config = import_config(source, architecture, foreign, mode, options)
        both = _correspondence(architecture, mode, config, foreign, options)
    blocks = all_blocks(architecture.rules_for(foreign.tied), config, both)
    if extension is not None:
        # Export did not read the copies, which may have changed since: they are in the extension.
        blocks = [block for block in blocks if not block.copy]
    unused = check_tensors(source, architecture, foreign, blocks)
    if foreign.tied:
        check_tied_head(source)
    if extension is None and source.path_of(EXTENSION).is_file():
        unused[EXTENSION] = "--experts is given"
    new_weights = _new_weights(source, foreign, config, blocks, options.seed)
    return ImportPlan(
        source=source,
        architecture=architecture,
        options=options,
        mode=mode,
        config=config,
        both=both,
        forms=_forms(source, config, blocks, extension),
        sources=_sources(source, config, blocks, extension, new_weights),
        new_weights=new_weights,
        extension=extension,
        unused=unused,
    )


def _new_weights(
    source: HuggingFaceModel, foreign: ForeignModel, config: RunConfig, blocks: list[Block], seed: int
) -> NewWeights:
    """New rows follow the distributions of the source's text ids."""
    num_text_ids = min(config.vocab.text_vocab_size, foreign.vocab_size)

    head = EMBEDDING if config.model.share_embeddings_and_output_weights else HEAD

    def distribution(key: str) -> RowDistribution:
        name = next(block.name for block in blocks if block.region.key == key)
        return RowDistribution.of(lambda start, rows: source.read(name, start, rows), num_text_ids)

    return NewWeights(config, seed, distribution(EMBEDDING), distribution(head).mean)


def _sources(
    source: HuggingFaceModel,
    config: RunConfig,
    blocks: list[Block],
    extension: Extension | None,
    new_weights: NewWeights,
) -> Sources:
    """What every native region is made of, each row once, in the order of the forward pass.

    Raises:
        CheckpointError: two blocks hold the same row, or none holds a row that cannot be new.
    """
    shapes = native_shapes(config)
    sources: Sources = {piece.region: piece for block in blocks for piece in cut_block(block)}
    if extension is not None:
        sources |= {region: name for name, region in extension.regions.items()}
        filled = [*(block.region for block in blocks), *extension.regions.values()]
    else:
        filled = [block.region for block in blocks]
    try:
        rest = open_regions(shapes, filled)
    except ValueError as error:
        raise CheckpointError(f"{source.directory}: {error}") from None
    for region in rest:
        if not new_weights.covers(region):
            raise CheckpointError(f"{source.directory}: holds nothing for {region.key}")
        sources |= dict.fromkeys(cut(region))
    place = {key: index for index, key in enumerate(shapes)}
    return dict(sorted(sources.items(), key=lambda item: (place[item[0].key], item[0].offsets)))


def _correspondence(
    architecture: Architecture, mode: str, config: RunConfig, foreign: ForeignModel, options: ImportOptions
) -> Correspondence:
    num_moe_layers = config.model.num_layers - config.model.first_k_dense_replace
    vocab = config.vocab
    ids = architecture.ids(vocab, foreign.vocab_size)
    if mode == "as they are":
        experts = (tuple(Origin(expert) for expert in range(foreign.num_experts)),) * num_moe_layers
        return Correspondence(experts, ids)
    usage = None if options.usage is None else read_usage(options.usage, foreign, num_moe_layers, vocab.modality_names)
    return Correspondence(origins(mode, config, foreign, usage), ids)


def _forms(
    source: HuggingFaceModel, config: RunConfig, blocks: list[Block], extension: Extension | None
) -> dict[str, TensorForm]:
    """The shape and type of every native tensor: the type of the source, for new tensors that of the embedding."""
    made_of = [(block.region.key, block.name, _stored_type(source, block)) for block in blocks]
    if extension is not None:
        assert extension.source is not None
        tensors = extension.source.tensors
        made_of += [(region.key, name, tensors[name].dtype) for name, region in extension.regions.items()]
    dtypes: dict[str, torch.dtype] = {}
    for key, name, dtype in made_of:
        if dtypes.setdefault(key, dtype) != dtype:
            raise CheckpointError(
                f"{source.directory}: tensor {name} is {dtype}, but others that go into {key} are {dtypes[key]}"
            )
    for layer in range(config.model.first_k_dense_replace, config.model.num_layers):
        dtypes[EXPERT_BIAS.format(layer=layer)] = torch.float32
    shapes = native_shapes(config)
    return {key: TensorForm(shape, dtypes.get(key, dtypes[EMBEDDING])) for key, shape in shapes.items()}


def _stored_type(source: HuggingFaceModel, block: Block) -> torch.dtype:
    """The type that holds a block exactly. Half of a small fp16 number may not be an fp16 number."""
    dtype = source.tensors[block.name].dtype
    return torch.float32 if block.scale != 1 and dtype == torch.float16 else dtype
