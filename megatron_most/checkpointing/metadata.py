"""What a checkpoint says of itself, and whether it fits a configuration."""

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
from megatron_most.checkpointing.directory import resolve
from megatron_most.config import RunConfig, number_experts, with_new_names
from megatron_most.data.storage.sidecar import read_sidecar
from megatron_most.errors import CheckpointError
from megatron_most.files import read_json
from megatron_most.keys import training_only
from megatron_most.text import load_tokenizer
from megatron_most.vocab import VocabLayout

METADATA = "checkpoint.json"
FORMAT = 2
"""What the tensors of a checkpoint mean. 2: routers and experts in logical order; 1 had them in the writer's order."""

TRAINING_ONLY = training_only(RunConfig)
"""Keys of the model section that do not change what given weights compute."""


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Which tokenizer, codec or dataset: its name as configured, and its content's fingerprint.

    None stands for what is not known: a codec of a pretrained name.
    """

    name: str
    fingerprint: str | None

    @classmethod
    def of_tokenizer(cls, config: RunConfig) -> Fingerprint | None:
        """Of the run's tokenizer, None when it names none; raises what :func:`load_tokenizer` raises."""
        return None if config.tokenizer is None else cls(config.tokenizer, load_tokenizer(config.tokenizer).fingerprint)

    @classmethod
    def of_codec(cls, config: RunConfig) -> Fingerprint | None:
        """Of the run's codec, None when it names none."""
        if config.codec is None:
            return None
        path = codec_file(config.codec)
        return cls(config.codec, None if path is None else file_fingerprint(path))

    @classmethod
    def of_dataset(cls, path: str) -> Fingerprint:
        """Of a built dataset, from its sidecar and the sizes of its files: cheap, and blind to a bit that flipped.

        The command and the version of the tool that built it do not count: the same data may be built again.

        Raises:
            DataError: it is missing or unreadable.
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
        config: the run configuration as nested dicts, its keys by their names of today.
        tokenizer, codec: fingerprints, where the run names them.
        world_size: ranks that wrote it.
        pending: metrics gathered since the last logged line, so that a resumed run logs what an undisturbed one does.
        versions: packages that wrote it.
        datasets: fingerprints of the training datasets.
        skipped_steps: those of ``step`` that did not update the weights, because their gradients were too large.
        format: :data:`FORMAT` of the writer.
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
    format: int = FORMAT

    @property
    def num_updates(self) -> int:
        """Steps that updated the weights: what AdamW and the learning-rate schedule have counted."""
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

    Raises:
        CheckpointError: there is none, it cannot be read, or it has another format.
    """
    directory = resolve(path)
    values = read_json(directory / METADATA, CheckpointError)
    written = values.get("format", 1)
    if written != FORMAT:
        raise CheckpointError(
            f"{directory}: written in checkpoint format {written!r}; this version reads and writes format {FORMAT}"
        )
    try:
        return CheckpointMetadata.from_dict(values)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{directory / METADATA}: not the metadata of a checkpoint: {error}") from None


def check_same_model(directory: Path, metadata: CheckpointMetadata, config: RunConfig) -> None:
    """Raise :class:`CheckpointError` naming the first field in which the checkpoint is not of ``config``'s model."""
    theirs, mine = _with_numbered_experts(metadata.config), _with_numbered_experts(dataclasses.asdict(config))
    for section in ("vocab", "model"):
        difference = first_difference(theirs.get(section), mine[section], section, ignore=TRAINING_ONLY)
        if difference:
            field, theirs, ours = difference
            raise CheckpointError(
                f"{directory}: belongs to another model: {field} is {theirs!r} in the checkpoint,"
                f" {ours!r} in the config"
            )
    # How fast biases move is a matter of training; whether there are any is not.
    their_rate = metadata.config["model"]["moe"]["moe_router_bias_update_rate"]
    my_rate = config.model.moe.moe_router_bias_update_rate
    if (their_rate > 0) != (my_rate > 0):
        raise CheckpointError(
            f"{directory}: belongs to another model: model.moe.moe_router_bias_update_rate is {their_rate!r} in the"
            f" checkpoint, {my_rate!r} in the config, and expert biases are there only above 0"
        )
    for what, theirs, ours in (
        ("tokenizer", metadata.tokenizer, Fingerprint.of_tokenizer(config)),
        ("codec", metadata.codec, Fingerprint.of_codec(config)),
    ):
        known = theirs and ours and theirs.fingerprint and ours.fingerprint
        if known and theirs.fingerprint != ours.fingerprint:
            raise CheckpointError(
                f"{directory}: belongs to another {what}: {theirs.name} ({theirs.fingerprint[:12]}) in the checkpoint,"
                f" {ours.name} ({ours.fingerprint[:12]}) in the config"
            )


def _with_numbered_experts(config: dict[str, Any]) -> dict[str, Any]:
    """A copy in which every pool has the list of its experts: one that is given by its size may be the same."""
    config = copy.deepcopy(config)
    moe = config["model"]["moe"]
    pools = [*moe["groups"], moe["common"]]
    for pool, experts in zip(pools, number_experts([(p["size"], p["experts"]) for p in pools]), strict=True):
        pool["experts"] = list(experts)
    return config


def check_same_data(directory: Path, metadata: CheckpointMetadata, datasets: list[Fingerprint]) -> None:
    """Raise :class:`CheckpointError` naming the first dataset that is not what the checkpoint was trained on.

    Datasets are compared by name: which ones a run takes is a matter of its configuration.
    """
    theirs = {dataset.name: dataset.fingerprint for dataset in metadata.datasets}
    for dataset in datasets:
        if theirs.get(dataset.name, dataset.fingerprint) != dataset.fingerprint:
            raise CheckpointError(
                f"{directory}: dataset {dataset.name} was built anew, with other content, since this checkpoint was"
                " trained on it; bring the old one back, or choose another run_dir"
            )


def first_difference(
    theirs: object, mine: object, field: str, ignore: Iterable[str] = ()
) -> tuple[str, object, object] | None:
    """``(dotted field, their value, my value)`` of the first difference of two nested structures, in my order.

    Args:
        ignore: fields that may differ; ``[]`` in their names stands for every place of a list.
    """
    if re.sub(r"\[\d+\]", "[]", field) in ignore:
        return None
    if isinstance(theirs, dict) and isinstance(mine, dict):
        keys = [*mine, *(key for key in theirs if key not in mine)]
        entries = [(theirs.get(key), mine.get(key), f"{field}.{key}") for key in keys]
    elif isinstance(theirs, list) and isinstance(mine, list) and len(theirs) == len(mine):
        entries = [(*pair, f"{field}[{place}]") for place, pair in enumerate(zip(theirs, mine, strict=True))]
    else:
        return None if theirs == mine else (field, theirs, mine)
    differences = (first_difference(*entry, ignore) for entry in entries)
    return next((difference for difference in differences if difference), None)
