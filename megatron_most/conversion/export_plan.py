"""Plans an export: the foreign tensors to write and the native regions that they consist of."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_most.checkpointing import CheckpointMetadata, read_metadata, resolve
from megatron_most.checkpointing.directory import STATE
from megatron_most.checkpointing.regions import Region, StateReader, TensorForm
from megatron_most.config import RunConfig
from megatron_most.config.load import build_config
from megatron_most.conversion.architecture import Architecture, ForeignModel, Target
from megatron_most.conversion.architectures import BY_NAME
from megatron_most.conversion.extension import Extension, shape_config
from megatron_most.conversion.hugging_face import is_finite
from megatron_most.conversion.import_plan import RECORD
from megatron_most.conversion.native import EMBEDDING, is_expert_bias, native_shapes
from megatron_most.conversion.weight_map import Block, all_blocks, cut, open_regions, row_axis
from megatron_most.errors import CheckpointError, ConfigError
from megatron_most.files import read_json

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

Blocks = dict[str, list[Block]]
"""Foreign tensor -> the blocks that its rows equal. Blocks with the same rows must agree."""


@dataclass
class ExportPlan:
    """Everything that one export needs.

    Args:
        dtype: ``bf16`` or ``fp32`` for all weights; None keeps the stored types.
        forms: the foreign tensors, as they are written.
        extension: what the format has no place for; None if there is nothing, or if it is not wanted.
        extension_forms: the tensors of the extension, as they are written.
        left_out: names of the regions that are in no file.
        same_text, note: see :class:`~megatron_most.conversion.architecture.Target`.
    """

    checkpoint: Path
    config: RunConfig
    architecture: Architecture
    foreign: ForeignModel
    dtype: str | None
    reader: StateReader
    blocks: Blocks
    forms: dict[str, TensorForm]
    extension: Extension | None
    extension_forms: dict[str, TensorForm]
    left_out: list[str]
    same_text: bool
    note: str

    @property
    def state(self) -> Path:
        return self.checkpoint / STATE

    def produce(self, name: str) -> torch.Tensor:
        """A foreign tensor.

        Raises:
            CheckpointError: native tensors that must be equal in this format differ, or a value is not finite.
        """
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
                    f"{self.checkpoint}: {self.architecture.name} has one {name}, but {_place(first)} and"
                    f" {_place(block)} differ"
                )
        return result.to(form.dtype)

    def produce_extension(self, name: str) -> torch.Tensor:
        """A tensor of the extension, named as in :attr:`extension_forms`."""
        assert self.extension is not None
        return self.reader.read(self.extension.regions[name]).to(self.extension_forms[name].dtype)


def plan_export(
    path: str | Path, name: str, dtype: str | None, experts: str = "text", with_extension: bool = True
) -> ExportPlan:
    """Read the metadata of a checkpoint and plan its export.

    Args:
        path: a native checkpoint, or a run directory for its newest one.
        name: of the format.
        dtype: ``bf16`` or ``fp32`` for all weights; None keeps the stored types.
        experts: for bases with experts, ``text`` for those that text may choose, or ``all``, which undoes a partition.
        with_extension: keep what the format has no place for in files beside the model.

    Raises:
        ConfigError: the format cannot hold this model.
        CheckpointError: the checkpoint is missing or broken.
    """
    directory = resolve(path)
    config = stored_config(directory, read_metadata(directory))
    architecture = BY_NAME[name]
    target = _target(directory, config, architecture, experts)
    reader = StateReader(directory / STATE)
    _check_shapes(directory, config, reader)
    blocks: Blocks = {}
    for block in all_blocks(architecture.rules_for(tied=False), config, target.both):
        if not block.copy:
            blocks.setdefault(block.name, []).append(block)
    forms = {tensor: _foreign_form(parts, reader, dtype) for tensor, parts in blocks.items()}
    # The one type that config.json gives must hold every value: readers convert all weights to it.
    # Expert biases are fp32 beside weights of any type.
    types = {form.dtype for name, form in forms.items() if not is_expert_bias(blocks[name][0].region.key)}
    held = functools.reduce(torch.promote_types, types)
    rest = _regions_without_place(config, blocks)
    values = {**shape_config(config), "tokenizer": None, "codec": config.codec}
    extension = Extension(values, target.both, rest) if rest and with_extension else None
    return ExportPlan(
        checkpoint=directory,
        config=config,
        architecture=architecture,
        foreign=dataclasses.replace(target.foreign, dtype=held),
        dtype=dtype,
        reader=reader,
        blocks=blocks,
        forms=forms,
        extension=extension,
        extension_forms={
            name: TensorForm(region.sizes, _written_dtype(region.key, reader, dtype))
            for name, region in (rest if extension is not None else {}).items()
        },
        left_out=[] if with_extension else list(rest),
        same_text=target.same_text,
        note=target.note,
    )


def _check_shapes(directory: Path, config: RunConfig, reader: StateReader) -> None:
    """Raise :class:`CheckpointError` unless the checkpoint has every tensor of ``config``'s model, in its shape."""
    for key, shape in native_shapes(config).items():
        form = reader.forms.get(key)
        if form is None or form.shape != shape:
            found = "missing" if form is None else list(form.shape)
            raise CheckpointError(f"{directory}: {key} is {found}, the configuration says {list(shape)}")


def _foreign_form(blocks: list[Block], reader: StateReader, dtype: str | None) -> TensorForm:
    """The form of the foreign tensor that ``blocks`` make up."""
    shape = (max(block.row + block.rows for block in blocks), *blocks[0].shape[1:])
    # A scaled fp16 tensor was imported as fp32: without its scale it fits the model's own type again.
    key = blocks[0].region.key if blocks[0].scale == 1 else EMBEDDING
    return TensorForm(shape, _written_dtype(key, reader, dtype))


def _regions_without_place(config: RunConfig, blocks: Blocks) -> dict[str, Region]:
    """The native regions that no foreign tensor holds, by name."""
    covered = [block.region for parts in blocks.values() for block in parts]
    rest = open_regions(native_shapes(config), covered)
    return {_region_name(piece): piece for region in rest for piece in cut(region)}


def _written_dtype(key: str, reader: StateReader, dtype: str | None) -> torch.dtype:
    """The type in which the parts of a native tensor are written, alike for all of them; expert biases keep theirs."""
    return reader.forms[key].dtype if dtype is None or is_expert_bias(key) else DTYPES[dtype]


def _target(directory: Path, config: RunConfig, architecture: Architecture, experts: str) -> Target:
    """The foreign model that the checkpoint in ``directory`` becomes."""
    if experts == "all" and "partition" not in architecture.modes:
        raise ConfigError(f"--experts=all: is only for bases with experts, not for --format {architecture.name}")
    # Of the import that made this checkpoint, or that its run started from; None if it is gone.
    places = [directory, *([Path(config.checkpoint.load)] if config.checkpoint.load else [])]
    found = next((place / RECORD for place in places if (place / RECORD).is_file()), None)
    record = None if found is None else read_json(found, CheckpointError)
    return architecture.target(config, experts, record)


def stored_config(directory: Path, metadata: CheckpointMetadata) -> RunConfig:
    """The configuration of a checkpoint, changed to run in one process."""
    values = {name: section for name, section in metadata.config.items() if name not in ("parallel", "data")}
    values["data"] = {"seq_length": metadata.config["data"]["seq_length"]}
    return build_config(
        str(directory), values, ["training.micro_batch_size=1", "model.moe.moe_token_dispatcher_type=alltoall"]
    )


def _region_name(region: Region) -> str:
    """``key[expert, first row]``, unique because regions do not overlap."""
    place = region.offsets[: row_axis(region.key, region.sizes) + 1]
    return f"{region.key}[{','.join(map(str, place))}]"


def _place(block: Block) -> str:
    return f"{block.region.key}[{block.region.offsets[0]}]" if len(block.region.sizes) == 3 else block.region.key
