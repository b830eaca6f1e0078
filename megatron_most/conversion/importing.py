"""Hugging Face -> native checkpoint, streamed."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_most import parallel, platform
from megatron_most.checkpointing import CheckpointMetadata, Fingerprint
from megatron_most.checkpointing.region_io import STATE, Region, StateReader, TensorForm, write_checkpoint
from megatron_most.config import CONFIG, ParallelConfig, dump_config
from megatron_most.conversion.hugging_face import TOKENIZER_FILES, HuggingFaceModel
from megatron_most.conversion.import_config import ImportOptions
from megatron_most.conversion.import_plan import RECORD, ImportPlan, num_bytes, plan_import
from megatron_most.conversion.verification import check_logits, is_small
from megatron_most.errors import CheckpointError, ConfigError
from megatron_most.files import write_json, write_text
from megatron_most.progress import Progress
from megatron_most.text import load_tokenizer
from megatron_most.training.run_directory import versions

TOKENIZER = "tokenizer"

CHECKED_BYTES = 1 << 28


def import_model(directory: str | Path, out: str | Path, options: ImportOptions) -> Path:
    """Convert the model in ``directory`` into the native checkpoint ``out``. Collective under ``torchrun``.

    Every rank reads and writes its share; ``out`` must be on storage that all see.

    Raises:
        ConfigError, CheckpointError: one line; ``out`` is not there then.
    """
    out = Path(out)
    platform.install()
    parallel.initialize(ParallelConfig(), options.seed)
    try:
        plan = parallel.together(lambda: _plan(directory, out, options))
        mine = share_of(plan.regions, plan.forms, dist.get_rank(), dist.get_world_size())
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


def share_of(regions: Sequence[Region], forms: dict[str, TensorForm], rank: int, world_size: int) -> list[Region]:
    """The run of regions that a rank writes: as many bytes for each, and files read from front to end."""
    total = sum(num_bytes(region, forms) for region in regions)
    mine, before = [], 0
    for region in regions:
        if before * world_size // max(1, total) == rank:
            mine.append(region)
        before += num_bytes(region, forms)
    return mine


def _plan(directory: str | Path, out: Path, options: ImportOptions) -> ImportPlan:
    if out.exists():
        raise CheckpointError(f"{out}: exists already; name a directory that does not")
    plan = plan_import(directory, options)
    require_space(out, plan.num_bytes)
    present = [name for name in TOKENIZER_FILES if plan.source.path_of(name).is_file()]
    if {"tokenizer.json", "tokenizer.model"} & {*present}:
        # A tokenizer that cannot be read would only be found when training starts.
        size = load_tokenizer(plan.source.directory).vocab_size
        if size > plan.config.vocab.text_vocab_size:
            raise ConfigError(
                f"vocab.text_vocab_size={plan.config.vocab.text_vocab_size}: the tokenizer of {plan.source.directory}"
                f" has {size} ids"
            )
        plan.config.tokenizer = str(out / TOKENIZER)
    return plan


def require_space(out: Path, needed: int) -> None:
    """Raise :class:`CheckpointError` unless the storage of ``out`` has room for ``needed`` bytes."""
    folder = next(parent for parent in out.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(f"{out}: needs {needed / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB left")


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
    """What stands beside the tensors, and whether they are right; on rank 0."""
    if plan.config.tokenizer is not None:
        copy_tokenizer(plan.source, made / TOKENIZER)
    config = dataclasses.replace(plan.config, checkpoint=dataclasses.replace(plan.config.checkpoint, load=str(out)))
    write_text(made / CONFIG, dump_config(config), CheckpointError)
    checks = {"tensors": _check_tensors(plan, made), "logits": _check_logits(plan, made)}
    for what, result in checks.items():
        print(f"checked {what}: {result['said']}", flush=True)
    write_json(made / RECORD, _record(plan, checks), CheckpointError)


def copy_tokenizer(source: HuggingFaceModel, folder: Path) -> None:
    """Carry the tokenizer's files along."""
    folder.mkdir()
    for name in TOKENIZER_FILES:
        path = source.path_of(name)
        if path.is_file():
            shutil.copyfile(path, folder / name)


def _check_tensors(plan: ImportPlan, made: Path) -> dict[str, Any]:
    """Read regions of every kind of tensor back and compare them, bit for bit, with the source."""
    reader = StateReader(made / STATE)
    if reader.forms != plan.forms:
        raise CheckpointError(f"{made}: the tensors read back are not those that were written")
    sample = sample_regions(plan.regions, plan.forms)
    for region in sample:
        if not torch.equal(reader.read(region), plan.produce(region)):
            raise CheckpointError(f"{made}: {region.key} at {list(region.offsets)} is not what was written")
    left = f", {len(plan.unused)} left aside" if plan.unused else ""
    new = f", {len(plan.drawn)} with new weights" if plan.drawn else ""
    return {
        "regions": len(sample),
        "said": f"{len(plan.source.tensors)} source tensors{left} -> {len(plan.forms)} tensors{new}, all in"
        f" {len(plan.regions)} pieces; {len(sample)} of them, of every kind, read back equal bit for bit",
    }


def sample_regions(regions: Sequence[Region], forms: dict[str, TensorForm]) -> list[Region]:
    """Regions of every kind of tensor, first and last layer among them, up to a bounded number of bytes."""
    kinds: dict[str, list[Region]] = {}
    for region in regions:
        kind = ".".join(part for part in region.key.split(".") if not part.isdecimal())
        kinds.setdefault(kind, []).append(region)
    sample, budget = [], CHECKED_BYTES
    # The last of each kind first: it is the farthest from where a mistake in counting starts.
    order = [entry for place in range(8) for found in kinds.values() for entry in _nth(found, place)]
    for region in order:
        if budget >= num_bytes(region, forms):
            sample.append(region)
            budget -= num_bytes(region, forms)
    return sample


def _nth(regions: list[Region], place: int) -> list[Region]:
    """One of eight places spread over the list, from its end."""
    spread = sorted({len(regions) - 1 - step * (len(regions) - 1) // 7 for step in range(8)}, reverse=True)
    return [regions[spread[place]]] if place < len(spread) else []


def _check_logits(plan: ImportPlan, made: Path) -> dict[str, Any]:
    if dist.get_world_size() > 1:
        return {"said": "not compared under torchrun; most convert verify does"}
    if not is_small(plan.config):
        return {"said": "not compared, the model is not small; most convert verify does"}
    # Text loses experts when they are shared out: how much is worth knowing, and no mistake.
    tolerance = None if plan.mode == "partition" or plan.noise else 1e-4
    return check_logits(plan.source, plan.config, made / STATE, tolerance)


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
        "noise": plan.noise,
        "seed": plan.seed,
        "left_aside": plan.unused,
        "new": plan.drawn,
        "checks": checks,
    }
