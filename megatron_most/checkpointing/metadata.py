"""Metadata of a checkpoint, and whether the checkpoint fits a configuration."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_most.audio import codec_file, file_fingerprint
from megatron_most.checkpointing.directory import MANIFEST, read_manifest, resolve, step_of, verify_small_files
from megatron_most.config import ModelConfig, RunConfig, number_experts, with_new_names
from megatron_most.data.storage.sidecar import read_sidecar
from megatron_most.errors import CheckpointError
from megatron_most.files import read_json
from megatron_most.keys import training_only
from megatron_most.text import load_tokenizer
from megatron_most.vocab import VocabLayout

METADATA = "checkpoint.json"
FORMAT = 2
"""Version of the format. In 2, routers and experts are in logical order; in 1 they were in the writer's order."""

_TYPES: dict[str, type] = {
    **dict.fromkeys(("step", "consumed_samples", "consumed_tokens", "world_size"), int),
    **dict.fromkeys(("config", "pending", "versions"), dict),
}

TRAINING_ONLY = training_only(RunConfig)
"""Keys of the ``model`` section that do not change what given weights compute."""


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Identifies a tokenizer, codec or dataset: its configured name, and the fingerprint of its content.

    The fingerprint is None if it is unknown, as for a codec that is given by the name of a pretrained model.
    """

    name: str
    fingerprint: str | None

    @classmethod
    def of_tokenizer(cls, config: RunConfig) -> Fingerprint | None:
        """Of the run's tokenizer, None if it has none. Raises the errors of :func:`load_tokenizer`."""
        return None if config.tokenizer is None else cls(config.tokenizer, load_tokenizer(config.tokenizer).fingerprint)

    @classmethod
    def of_codec(cls, config: RunConfig) -> Fingerprint | None:
        """Of the run's codec, None if it has none."""
        if config.codec is None:
            return None
        path = codec_file(config.codec)
        return cls(config.codec, None if path is None else file_fingerprint(path))

    @classmethod
    def of_dataset(cls, path: str) -> Fingerprint:
        """Of a built dataset, from its sidecar and the sizes of its files. Cheap, but does not detect a flipped bit.

        The command and the tool version that built it are left out: the same data may be built again.

        Raises:
            DataError: the dataset is missing or unreadable.
        """
        sidecar = read_sidecar(f"{path}.json", f"dataset {path}")
        built = {key: value for key, value in sidecar["provenance"].items() if key not in ("command", "tool_version")}
        files = [Path(f"{path}.{part}.{kind}") for part in ("ids", "mask", "codes") for kind in ("bin", "idx")]
        sizes = [file.stat().st_size if file.is_file() else None for file in files]
        content = json.dumps([{**sidecar, "provenance": built}, sizes], sort_keys=True)
        return cls(path, hashlib.sha256(content.encode()).hexdigest())


@dataclasses.dataclass
class CheckpointMetadata:
    """The readable part of a checkpoint.

    Args:
        step: steps taken.
        consumed_samples: rows read from the training blend; gives the data position.
        consumed_tokens: positions trained on, padding left out.
        config: the run configuration as nested dicts, with the current names of its keys.
        tokenizer, codec: fingerprints, None if the run has none.
        world_size: number of ranks that wrote it.
        pending: metrics gathered since the last logged line, so that a resumed run logs what an uninterrupted one does.
        versions: versions of the packages that wrote it.
        datasets: fingerprints of the training datasets.
        skipped_steps: how many of ``step`` did not update the weights.
        nonfinite_steps: how many of the last steps, in a row, did so because their loss or gradient was not finite.
        format: :data:`FORMAT` of the version that wrote it.
    """

    step: int
    consumed_samples: int
    consumed_tokens: int
    config: dict[str, Any]
    tokenizer: Fingerprint | None
    codec: Fingerprint | None
    world_size: int
    pending: dict[str, Any]
    versions: dict[str, str]
    datasets: list[Fingerprint]
    skipped_steps: int = 0
    nonfinite_steps: int = 0
    format: int = FORMAT

    @property
    def num_updates(self) -> int:
        """Steps that updated the weights, as counted by AdamW and the learning-rate schedule."""
        return self.step - self.skipped_steps

    @property
    def vocab(self) -> VocabLayout:
        return VocabLayout(**self.config["vocab"])

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CheckpointMetadata:
        fingerprints = {
            name: None if values[name] is None else Fingerprint(**values[name]) for name in ("tokenizer", "codec")
        }
        datasets = [Fingerprint(**entry) for entry in values["datasets"]]
        config = with_new_names(values["config"])
        return cls(**{**values, **fingerprints, "datasets": datasets, "config": config})


def read_metadata(path: str | Path) -> CheckpointMetadata:
    """Metadata of a checkpoint directory, or of the newest complete one of a run directory.

    Every file but those of tensors is verified first, so that nothing acts on a damaged one.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, it has another format, or it is of another step than the
            name of its directory says.
    """
    directory = resolve(path)
    if METADATA not in read_manifest(directory):
        raise CheckpointError(f"{directory}: incomplete: {MANIFEST} does not list {METADATA}")
    verify_small_files(directory)
    values = read_json(directory / METADATA, CheckpointError)
    written = values.get("format", 1)
    if written != FORMAT:
        raise CheckpointError(
            f"{directory}: written in checkpoint format {written!r}; this version reads and writes format {FORMAT}"
        )
    try:
        for name, kind in _TYPES.items():
            if not isinstance(values[name], kind):
                raise TypeError(f"{name} is {values[name]!r}")
        metadata = CheckpointMetadata.from_dict(values)
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory / METADATA}: not the metadata of a checkpoint: {error}") from None
    if step_of(directory) not in (None, metadata.step):
        raise CheckpointError(
            f"{directory}: holds step {metadata.step!r}, which is not the step in its name; rename it or move it out of"
            " the run"
        )
    return metadata


def check_same_model(directory: Path, metadata: CheckpointMetadata, config: RunConfig) -> None:
    """Raise :class:`CheckpointError` if the checkpoint is of another model than ``config``'s; names the first field.

    The tokenizer and the codec must have the same content, as far as it is known.
    """
    stored = _with_numbered_experts(with_new_fields(metadata.config))
    wanted = _with_numbered_experts(dataclasses.asdict(config))
    for section in ("vocab", "model"):
        difference = first_difference(stored.get(section), wanted[section], section, ignore=TRAINING_ONLY)
        if difference:
            field, theirs, mine = difference
            raise CheckpointError(
                f"{directory}: belongs to another model: {field} is {theirs!r} in the checkpoint,"
                f" {mine!r} in the config"
            )
    # The update rate of expert biases may change during training, but not whether the model has biases.
    their_rate = metadata.config["model"]["moe"]["moe_router_bias_update_rate"]
    my_rate = config.model.moe.moe_router_bias_update_rate
    if (their_rate > 0) != (my_rate > 0):
        raise CheckpointError(
            f"{directory}: belongs to another model: model.moe.moe_router_bias_update_rate is {their_rate!r} in the"
            f" checkpoint, {my_rate!r} in the config, and only a rate above 0 gives a model expert biases"
        )
    _check_same(directory, "tokenizer", metadata.tokenizer, Fingerprint.of_tokenizer(config))
    _check_same(directory, "codec", metadata.codec, Fingerprint.of_codec(config))


def _check_same(directory: Path, what: str, theirs: Fingerprint | None, mine: Fingerprint | None) -> None:
    if theirs is None or mine is None or theirs.fingerprint is None or mine.fingerprint is None:
        return
    if theirs.fingerprint != mine.fingerprint:
        raise CheckpointError(
            f"{directory}: belongs to another {what}: {theirs.name} ({theirs.fingerprint[:12]}) in the checkpoint,"
            f" {mine.name} ({mine.fingerprint[:12]}) in the config"
        )


def _with_numbered_experts(config: dict[str, Any]) -> dict[str, Any]:
    """A copy in which every pool lists its experts, so that a pool given by its size equals one given by a list."""
    config = copy.deepcopy(config)
    moe = config["model"]["moe"]
    pools = [*moe["groups"], moe["common"]]
    for pool, experts in zip(pools, number_experts([(p["size"], p["experts"]) for p in pools]), strict=True):
        pool["experts"] = list(experts)
    return config


def check_same_data(directory: Path, metadata: CheckpointMetadata, datasets: list[Fingerprint]) -> None:
    """Raise :class:`CheckpointError` for the first dataset whose content changed since the checkpoint.

    Datasets are compared by name. A run may use other datasets than the checkpoint's.
    """
    theirs = {dataset.name: dataset.fingerprint for dataset in metadata.datasets}
    for dataset in datasets:
        if theirs.get(dataset.name, dataset.fingerprint) != dataset.fingerprint:
            raise CheckpointError(
                f"{directory}: dataset {dataset.name} was rebuilt with other content since this checkpoint was trained"
                " on it; restore the old dataset, or choose another run_dir"
            )


def with_new_fields(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of a recorded configuration with the fields of the model that the version that wrote it did not have.

    They have their defaults, with which a model computes what it did then.
    """
    return {**config, "model": _filled(config.get("model"), dataclasses.asdict(ModelConfig()))}


def _filled(values: Any, defaults: Any) -> Any:
    if not isinstance(values, dict) or not isinstance(defaults, dict):
        return values
    return {**defaults, **{key: _filled(value, defaults.get(key)) for key, value in values.items()}}


def first_difference(
    theirs: object, mine: object, field: str, ignore: Iterable[str] = ()
) -> tuple[str, object, object] | None:
    """``(dotted field, their value, my value)`` of the first difference between two nested structures, in my order.

    Args:
        ignore: fields that may differ; ``[]`` in a name stands for every index of a list.
    """
    if re.sub(r"\[\d+\]", "[]", field) in ignore:
        return None
    if isinstance(theirs, dict) and isinstance(mine, dict):
        keys = [*mine, *(key for key in theirs if key not in mine)]
        entries = [(theirs.get(key), mine.get(key), f"{field}.{key}") for key in keys]
    elif isinstance(theirs, list) and isinstance(mine, list) and len(theirs) == len(mine):
        entries = [(*pair, f"{field}[{index}]") for index, pair in enumerate(zip(theirs, mine, strict=True))]
    else:
        return None if theirs == mine else (field, theirs, mine)
    differences = (first_difference(*entry, ignore) for entry in entries)
    return next((difference for difference in differences if difference), None)
