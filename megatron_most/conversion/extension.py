"""The extension of an exported model: what its format has no place for, in two kinds of files beside it.

``most_extension.json`` holds ``format`` (1), ``config`` (the sections ``vocab`` and ``model`` of the run configuration,
and what else is needed to build it), ``experts`` (for each MoE layer and logical expert, the foreign expert or null),
``ids`` (ranges ``[native, foreign, count]``) and ``tensors`` (name -> ``key``, ``offsets`` and ``sizes`` of the native
region it holds). The tensors are in ``most_extension*.safetensors``. Other software ignores these files. Import reads
them, so that export followed by import changes nothing.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from megatron_most.checkpointing.regions import Region
from megatron_most.config import RunConfig, with_new_names
from megatron_most.conversion.hugging_face import HuggingFaceModel
from megatron_most.conversion.native import EMBEDDING, native_shapes
from megatron_most.conversion.weight_map import Correspondence, IdRun, Origin
from megatron_most.errors import CheckpointError
from megatron_most.files import read_json

EXTENSION = "most_extension.json"
EXTENSION_TENSORS = "most_extension"
"""Stem of the names of the safetensors files."""

_FORMAT = 1


@dataclass(frozen=True)
class Extension:
    """The content of an extension.

    Args:
        config: a run configuration as nested dicts.
        both: which experts and ids correspond to those of the model beside it.
        regions: name of a tensor -> the native region it holds.
        source: the files with the tensors; None for an extension that is not written yet.
    """

    config: dict[str, Any]
    both: Correspondence
    regions: dict[str, Region]
    source: HuggingFaceModel | None = None

    @classmethod
    def read(cls, model: HuggingFaceModel) -> Extension | None:
        """The extension beside a model, None if there is none. Raises :class:`CheckpointError` if it is broken."""
        path = model.path_of(EXTENSION)
        if not path.is_file():
            return None
        values = read_json(path, CheckpointError)
        if values.get("format") != _FORMAT:
            raise CheckpointError(f"{path}: has format {values.get('format')!r}, this version reads {_FORMAT}")
        try:
            both = Correspondence(
                tuple(
                    tuple(None if expert is None else Origin(expert) for expert in layer) for layer in values["experts"]
                ),
                tuple(IdRun(*run) for run in values["ids"]),
            )
            regions = {
                name: Region(entry["key"], tuple(entry["offsets"]), tuple(entry["sizes"]))
                for name, entry in values["tensors"].items()
            }
            config = with_new_names(values["config"])
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: not the description of an extension: {error}") from None
        source = HuggingFaceModel(model.directory, stem=EXTENSION_TENSORS)
        if source.tensors.keys() != regions.keys():
            name = sorted(source.tensors.keys() ^ regions.keys())[0]
            raise CheckpointError(f"{path}: tensor {name} must be both in this file and in the safetensors files")
        for name, region in regions.items():
            if source.tensors[name].shape != region.sizes:
                found = list(source.tensors[name].shape)
                raise CheckpointError(f"{path}: tensor {name} has shape {found}, its region {list(region.sizes)}")
        return cls(config, both, regions, source)

    def check(self, config: RunConfig) -> None:
        """Raise :class:`CheckpointError` unless everything that the extension names is in the model of ``config``."""
        shapes, model = native_shapes(config), config.model
        assert self.source is not None
        where = self.source.directory / EXTENSION
        layers = [len(layer) for layer in self.both.experts]
        if layers != [model.moe.num_experts] * (model.num_layers - model.first_k_dense_replace):
            raise CheckpointError(f"{where}: experts must list {model.moe.num_experts} for each MoE layer")
        for run in self.both.ids:
            if min(dataclasses.astuple(run)) < 0 or run.native + run.count > shapes[EMBEDDING][0]:
                raise CheckpointError(f"{where}: ids {list(dataclasses.astuple(run))} are outside the vocabulary")
        for name, region in self.regions.items():
            shape = shapes.get(region.key, ())
            if not len(shape) == len(region.offsets) == len(region.sizes) or any(
                not 0 <= offset < offset + size <= most
                for offset, size, most in zip(region.offsets, region.sizes, shape, strict=True)
            ):
                raise CheckpointError(f"{where}: {name} is not a region of a tensor of the model")

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "config": self.config,
            "experts": [[None if origin is None else origin.expert for origin in layer] for layer in self.both.experts],
            "ids": [dataclasses.astuple(run) for run in self.both.ids],
            "tensors": {name: dataclasses.asdict(region) for name, region in self.regions.items()},
        }


def shape_config(config: RunConfig) -> dict[str, Any]:
    """The parts of a run configuration that define its model."""
    return {
        "vocab": dataclasses.asdict(config.vocab),
        "model": dataclasses.asdict(config.model),
        "precision": {"dtype": config.precision.dtype},
        "data": {"seq_length": config.data.seq_length},
    }
