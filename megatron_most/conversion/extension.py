"""What a foreign format has no place for, beside it: ``most_extension.json`` and ``most_extension*.safetensors``.

The JSON file holds ``format`` (1), ``config`` (the sections ``vocab`` and ``model`` of the run configuration, and what
else building it needs), ``experts`` (for each MoE layer and logical expert the foreign expert, or null), ``ids`` (runs
``[native, foreign, count]`` of ids) and ``tensors`` (name -> ``key``, ``offsets`` and ``sizes`` of the native region it
holds). Other software ignores both files; import reads them back, so that export followed by import is the identity.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from megatron_most.checkpointing.region_io import Region
from megatron_most.config import RunConfig, with_new_names
from megatron_most.conversion.hugging_face import HuggingFaceModel
from megatron_most.conversion.native import EMBEDDING, native_shapes
from megatron_most.conversion.weight_map import Correspondence, IdRun, Origin
from megatron_most.errors import CheckpointError
from megatron_most.files import read_json

EXTENSION = "most_extension.json"
EXTENSION_TENSORS = "most_extension"
"""Stem of the safetensors files."""

_FORMAT = 1


@dataclass(frozen=True)
class Extension:
    """What is written beside a model.

    Args:
        config: nested values of a run configuration.
        both: experts and ids of the foreign model beside it.
        regions: name of a tensor -> the native region it holds.
        source: where the tensors are; None while the extension is being made.
    """

    config: dict[str, Any]
    both: Correspondence
    regions: dict[str, Region]
    source: HuggingFaceModel | None = None

    @classmethod
    def read(cls, model: HuggingFaceModel) -> Extension | None:
        """The extension beside a model, None where there is none. Raises :class:`CheckpointError` when broken."""
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
            extension = cls(config, both, regions, HuggingFaceModel(model.directory, stem=EXTENSION_TENSORS))
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: not the description of an extension: {error}") from None
        if extension.source.tensors.keys() != regions.keys():
            name = sorted(extension.source.tensors.keys() ^ regions.keys())[0]
            raise CheckpointError(f"{path}: tensor {name} is in the description or in the files, not in both")
        for name, region in regions.items():
            if extension.source.tensors[name].shape != region.sizes:
                raise CheckpointError(f"{path}: tensor {name} has another shape than its region")
        return extension

    def check(self, config: RunConfig) -> None:
        """Raise :class:`CheckpointError` unless everything named is a part of the model of ``config``."""
        shapes, model = native_shapes(config), config.model
        where = f"{self.source.directory / EXTENSION}"
        layers = [len(layer) for layer in self.both.experts]
        if layers != [model.moe.num_experts] * (model.num_layers - model.first_k_dense_replace):
            raise CheckpointError(f"{where}: experts must name {model.moe.num_experts} for each MoE layer")
        for run in self.both.ids:
            if min(dataclasses.astuple(run)) < 0 or run.native + run.count > shapes[EMBEDDING][0]:
                raise CheckpointError(f"{where}: ids {list(dataclasses.astuple(run))} are outside of the vocabulary")
        for name, region in self.regions.items():
            shape = shapes.get(region.key, ())
            if not len(shape) == len(region.offsets) == len(region.sizes) or any(
                not 0 <= offset < offset + size <= most
                for offset, size, most in zip(region.offsets, region.sizes, shape, strict=True)
            ):
                raise CheckpointError(f"{where}: {name} is no region of a tensor of the model")

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "config": self.config,
            "experts": [[None if origin is None else origin.expert for origin in layer] for layer in self.both.experts],
            "ids": [dataclasses.astuple(run) for run in self.both.ids],
            "tensors": {name: dataclasses.asdict(region) for name, region in self.regions.items()},
        }


def shape_config(config: RunConfig) -> dict[str, Any]:
    """The parts of a run configuration that say what its model is."""
    return {
        "vocab": dataclasses.asdict(config.vocab),
        "model": dataclasses.asdict(config.model),
        "precision": {"dtype": config.precision.dtype},
        "data": {"seq_length": config.data.seq_length},
    }
