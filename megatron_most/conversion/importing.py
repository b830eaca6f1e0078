"""Imports a Hugging Face model into a native checkpoint, one region at a time."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_most import parallel, platform
from megatron_most.audio.codec import codec_file
from megatron_most.checkpointing import CheckpointMetadata, Fingerprint
from megatron_most.checkpointing.directory import STATE
from megatron_most.checkpointing.region_writer import write_checkpoint
from megatron_most.checkpointing.regions import Region, StateReader, TensorForm
from megatron_most.config import CONFIG, ParallelConfig, RunConfig, dump_config
from megatron_most.config.load import CONFIG_DIR
from megatron_most.conversion.foreign_layers import ExpertSubset
from megatron_most.conversion.hugging_face import CONFIG as MODEL_CONFIG
from megatron_most.conversion.hugging_face import TOKENIZER_FILES, HuggingFaceModel
from megatron_most.conversion.import_config import ImportOptions
from megatron_most.conversion.import_plan import RECORD, ImportPlan, num_bytes, plan_import
from megatron_most.conversion.verification import check_logits
from megatron_most.errors import CheckpointError, ConfigError
from megatron_most.extras import require
from megatron_most.files import read_json, write_json, write_text
from megatron_most.moe import ExpertGroups
from megatron_most.progress import Progress
from megatron_most.text import load_tokenizer
from megatron_most.text.stop_ids import GENERATION_CONFIG, eos_ids
from megatron_most.training.run_directory import versions

TOKENIZER = "tokenizer"
"""Folder of the tokenizer in an imported checkpoint."""

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Fields that ``config.json`` and ``generation_config.json`` both have; the second decides."""

TIMEOUT_MINUTES = 60.0
"""How long ranks of a conversion wait for each other: some read or compare far more bytes than others."""
CHECKED_BYTES = 1 << 28
"""How much of a result is read back and compared, at most."""


def import_model(directory: str | Path, out: str | Path, options: ImportOptions) -> Path:
    """Convert the model in ``directory`` into the native checkpoint ``out``. Collective under ``torchrun``.

    Every rank reads and writes a part of the regions, so all ranks must see the storage of ``out``.

    Raises:
        ConfigError, CheckpointError: one line; then ``out`` does not exist.
    """
    out = Path(out)
    platform.install()
    parallel.initialize(ParallelConfig(distributed_timeout_minutes=TIMEOUT_MINUTES), options.seed)
    try:
        plan = parallel.together(lambda: _plan(directory, out, options))
        mine = regions_of_rank(plan.regions, plan.forms, dist.get_rank(), dist.get_world_size())
        num_mine = sum(num_bytes(region, plan.forms) for region in mine)
        metadata = _metadata(plan, out)
        progress = Progress("import", num_mine, "B", enabled=dist.get_rank() == 0)

        def produce(region: Region) -> torch.Tensor:
            progress.add(num_bytes(region, plan.forms))
            return plan.produce(region)

        def finish(made: Path) -> None:
            progress.close()
            _finish(plan, metadata, made, out)

        with progress:
            write_checkpoint(out, metadata, plan.forms, mine, produce, finish)
    finally:
        parallel.destroy()
    return out


def regions_of_rank(
    regions: Sequence[Region], forms: dict[str, TensorForm], rank: int, world_size: int
) -> list[Region]:
    """The consecutive regions that a rank writes. Each rank gets about as many bytes, and reads files in order."""
    total = sum(num_bytes(region, forms) for region in regions)
    mine, before = [], 0
    for region in regions:
        if before * world_size // max(1, total) == rank:
            mine.append(region)
        before += num_bytes(region, forms)
    return mine


def _plan(directory: str | Path, out: Path, options: ImportOptions) -> ImportPlan:
    if out.exists():
        raise CheckpointError(f"{out}: exists already; name a new directory")
    if options.verify:
        require("transformers")
    plan = plan_import(directory, options)
    require_space(out, plan.num_bytes)
    # What is copied later is checked now: links, stop ids and the tokenizer, without which training would not start.
    present = {name for name in TOKENIZER_FILES if plan.source.path_of(name).is_file()}
    _generation_config(plan.source)
    if present.intersection(TOKENIZER_FILES[:2]):
        size = load_tokenizer(plan.source.directory).vocab_size
        if size > plan.config.vocab.text_vocab_size:
            raise ConfigError(
                f"vocab.text_vocab_size={plan.config.vocab.text_vocab_size}: the tokenizer of {plan.source.directory}"
                f" has {size} ids"
            )
        plan.config.tokenizer = str(out / TOKENIZER)
    return plan


def require_space(out: Path, needed: int) -> None:
    """Raise :class:`CheckpointError` unless the storage of ``out`` has ``needed`` bytes free."""
    folder = next(parent for parent in out.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(f"{out}: needs {needed / 1e9:.1f} GB, {folder} has only {free / 1e9:.1f} GB free")


def _metadata(plan: ImportPlan, out: Path) -> CheckpointMetadata:
    tokenizer = None
    if plan.config.tokenizer is not None:
        tokenizer = Fingerprint(plan.config.tokenizer, load_tokenizer(plan.source.directory).fingerprint)
    return CheckpointMetadata(
        step=0,
        consumed_samples=0,
        consumed_tokens=0,
        config=dataclasses.asdict(plan.config),
        tokenizer=tokenizer,
        codec=Fingerprint.of_codec(plan.config),
        world_size=dist.get_world_size(),
        pending={},
        versions=versions(),
        datasets=[],
    )


def _finish(plan: ImportPlan, metadata: CheckpointMetadata, made: Path, out: Path) -> None:
    """Write the files beside the tensors and check the result. Collective; rank 0 does the work."""
    config = _training_config(plan.config, out)

    def check_and_copy() -> dict[str, Any]:
        try:
            _copy_tokenizer(plan.source, made / TOKENIZER)
        except OSError as error:
            raise CheckpointError(f"{out}: cannot be written: {error.strerror}") from error
        write_text(made / CONFIG, dump_config(config), CheckpointError)
        return _check_tensors(plan, made)

    checks = {"tensors": parallel.on_rank_zero(check_and_copy), "logits": _check_logits(plan, made)}
    parallel.on_rank_zero(lambda: write_json(made / RECORD, _record(plan, checks), CheckpointError))
    if dist.get_rank() == 0:
        _say(checks, config, out)


def _say(checks: dict[str, dict[str, Any]], config: RunConfig, out: Path) -> None:
    for what, result in checks.items():
        print(f"checked {what}: {result['said']}", flush=True)
    missing = [name for name in ("tokenizer", "codec") if getattr(config, name) is None]
    if missing:
        print(
            f"{out / CONFIG}: {', '.join(missing)}: not set, and generation needs it; name what the data is built with"
        )


def _training_config(config: RunConfig, out: Path) -> RunConfig:
    """The configuration of a run that starts from the import: valid in any directory, and after ``out`` was moved."""
    tokenizer, codec = config.tokenizer, config.codec
    if tokenizer == str(out / TOKENIZER):
        tokenizer = f"{CONFIG_DIR}/{TOKENIZER}"
    if codec is not None and (file := codec_file(codec)):
        codec = str(file.absolute())
    checkpoint = dataclasses.replace(config.checkpoint, load=CONFIG_DIR)
    return dataclasses.replace(config, tokenizer=tokenizer, codec=codec, checkpoint=checkpoint)


def _copy_tokenizer(source: HuggingFaceModel, folder: Path) -> None:
    """Copy the tokenizer's files and ``generation_config.json``, or write the latter from ``config.json``."""
    folder.mkdir()
    for name in TOKENIZER_FILES:
        path = source.path_of(name)
        if path.is_file():
            shutil.copyfile(path, folder / name)
    values = _generation_config(source)
    if values and not (folder / GENERATION_CONFIG).exists():
        write_json(folder / GENERATION_CONFIG, values, CheckpointError)


def _generation_config(source: HuggingFaceModel) -> dict[str, Any]:
    """The content of ``generation_config.json``, which a model without that file has in ``config.json``.

    Raises:
        CheckpointError, ConfigError: it is unreadable, or its ``eos_token_id`` is not an id or a list of ids.
    """
    path = source.path_of(GENERATION_CONFIG)
    if path.is_file():
        values = read_json(path, CheckpointError)
    else:
        path = source.path_of(MODEL_CONFIG)
        values = {name: source.config[name] for name in SPECIAL_IDS if source.config.get(name) is not None}
    eos_ids(values, str(path))
    return values


def _check_tensors(plan: ImportPlan, made: Path) -> dict[str, Any]:
    """Read regions of every kind of tensor back and compare them with the source, bit for bit."""
    reader = StateReader(made / STATE)
    if reader.forms != plan.forms:
        raise CheckpointError(f"{made}: the tensors read back are not the ones that were written")
    sample = sample_regions(plan.regions, plan.forms)
    for region in sample:
        if not torch.equal(reader.read(region), plan.produce(region)):
            raise CheckpointError(f"{made}: {region.key} at {list(region.offsets)} differs from what was written")
    left = f", {len(plan.unused)} not used" if plan.unused else ""
    new = f", {len(plan.drawn)} with new weights" if plan.drawn else ""
    return {
        "regions": len(sample),
        "said": f"{len(plan.source.tensors)} source tensors{left} -> {len(plan.forms)} tensors{new}, all in"
        f" {len(plan.regions)} pieces; {len(sample)} of them, of every kind, read back equal bit for bit",
    }


def sample_regions(regions: Sequence[Region], forms: dict[str, TensorForm]) -> list[Region]:
    """Regions of every kind of tensor, from the first and the last layer too, of at most :data:`CHECKED_BYTES`."""
    kinds: dict[str, list[Region]] = {}
    for region in regions:
        kind = ".".join(part for part in region.key.split(".") if not part.isdecimal())
        kinds.setdefault(kind, []).append(region)
    sample, budget = [], CHECKED_BYTES
    # The last of each kind first: a wrong offset shows most there.
    order = [entry for place in range(8) for found in kinds.values() for entry in _nth(found, place)]
    for region in order:
        if budget >= num_bytes(region, forms):
            sample.append(region)
            budget -= num_bytes(region, forms)
    return sample


def _nth(regions: list[Region], place: int) -> list[Region]:
    """The region at one of eight places spread over the list, counted from its end; none if the list is shorter."""
    spread = sorted({len(regions) - 1 - step * (len(regions) - 1) // 7 for step in range(8)}, reverse=True)
    return [regions[spread[place]]] if place < len(spread) else []


def _check_logits(plan: ImportPlan, made: Path) -> dict[str, Any]:
    if not plan.options.verify:
        return {"said": "not compared (--no-verify)"}
    subset = _text_experts(plan)
    # Noise changes logits; and a partition takes experts away from text, which may be none that can be compared with.
    is_exact = plan.mode != "partition" or subset is not None
    tolerance = 1e-4 if is_exact and not plan.options.noise else None
    return check_logits(plan.source, plan.config, made / STATE, tolerance, subset)


def _text_experts(plan: ImportPlan) -> ExpertSubset | None:
    """The base's experts that text may choose in a partition, if they make up a model of the base's architecture."""
    moe = plan.config.model.moe
    if plan.mode != "partition" or moe.score_rule == "all" or plan.config.vocab.further_modalities:
        return None
    choice, text = ExpertGroups.from_config(moe).choices[0], moe.groups[0]
    origins = [[layer[expert] for expert in choice] for layer in plan.both.experts]
    experts = tuple(tuple(origin.expert for origin in layer if origin is not None) for layer in origins)
    return ExpertSubset(experts, text.moe_router_topk, text.moe_router_num_groups, text.moe_router_group_topk)


def _record(plan: ImportPlan, checks: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": 1,
        "source": {"directory": str(plan.source.directory), "architecture": plan.architecture.name},
        "source_config": plan.source.config,
        "experts": plan.mode,
        "origins": [
            [None if origin is None else [origin.expert, origin.copy] for origin in layer]
            for layer in plan.both.experts
        ],
        "noise": plan.options.noise,
        "seed": plan.options.seed,
        "left_aside": plan.unused,
        "new": plan.drawn,
        "checks": checks,
    }
