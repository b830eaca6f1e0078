"""Exports a native checkpoint to a Hugging Face folder, one tensor at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_most import parallel, platform
from megatron_most.checkpointing import directory as directories
from megatron_most.checkpointing.regions import TensorForm
from megatron_most.config import ParallelConfig
from megatron_most.conversion import hf_format
from megatron_most.conversion.export_plan import DTYPES, ExportPlan, plan_export
from megatron_most.conversion.extension import EXTENSION, EXTENSION_TENSORS
from megatron_most.conversion.hf_folder import write_companions
from megatron_most.conversion.hugging_face import CONFIG, MODEL, TOKENIZER_FILES, HuggingFaceModel
from megatron_most.conversion.importing import CHECKED_BYTES, SPECIAL_IDS, TIMEOUT_MINUTES, TOKENIZER, require_space
from megatron_most.conversion.safetensors_files import index_of, parse_size, plan_shards, size_of, write_file
from megatron_most.conversion.verification import check_logits
from megatron_most.errors import CheckpointError
from megatron_most.extras import require
from megatron_most.files import read_json, write_json
from megatron_most.progress import Progress
from megatron_most.text import load_tokenizer
from megatron_most.text.stop_ids import GENERATION_CONFIG


def export_model(
    checkpoint: str | Path,
    out: str | Path,
    name: str,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    experts: str = "text",
    with_extension: bool = True,
    verify: bool = True,
) -> Path:
    """Convert a native checkpoint into the folder ``out``. Collective under ``torchrun``: each rank writes some files.

    Args:
        checkpoint, name, dtype, experts, with_extension: see :func:`plan_export`.
        max_shard_size: largest size of a file, for example ``5GB``.
        verify: compare the logits with those of ``transformers``.

    Raises:
        ConfigError, CheckpointError: one line; then ``out`` does not exist.
    """
    out = Path(out)
    max_size = parse_size(max_shard_size)
    if verify:
        require("transformers")
    platform.install()
    parallel.initialize(ParallelConfig(distributed_timeout_minutes=TIMEOUT_MINUTES), seed=0)
    try:
        plan = parallel.together(lambda: _plan(checkpoint, out, name, dtype, experts, with_extension))
        rank, world_size = dist.get_rank(), dist.get_world_size()
        parallel.together(lambda: directories.verify_checksums(plan.checkpoint, rank, world_size))
        made = directories.temporary_directory(out)
        parallel.on_rank_zero(lambda: _prepare(made))
        try:
            parallel.together(lambda: _write_tensors(plan, made, max_size))
            parallel.on_rank_zero(lambda: _write_companions(plan, made, max_size))
            said = _check_logits(plan, made) if verify else "not compared (--no-verify)"
            parallel.on_rank_zero(lambda: _finish(plan, made, out, said))
        except BaseException:
            if rank == 0:
                shutil.rmtree(made, ignore_errors=True)
            raise
    finally:
        parallel.destroy()
    return out


def _plan(
    checkpoint: str | Path, out: Path, name: str, dtype: str | None, experts: str, with_extension: bool
) -> ExportPlan:
    if out.exists():
        raise CheckpointError(f"{out}: exists already; name a new directory")
    plan = plan_export(checkpoint, name, dtype, experts, with_extension)
    require_space(out, sum(map(size_of, [*plan.forms.values(), *plan.extension_forms.values()])))
    return plan


def _prepare(made: Path) -> None:
    try:
        if made.exists():
            shutil.rmtree(made)
        made.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{made}: cannot be written: {error.strerror}") from error


Forms = dict[str, TensorForm]
Produce = Callable[[str], torch.Tensor]
Group = tuple[str, Forms, Produce]


def _groups(plan: ExportPlan) -> list[Group]:
    """For the model and its extension: stem of the file names, tensors, and the function that makes them."""
    groups: list[Group] = [(MODEL, plan.forms, plan.produce)]
    if plan.extension is not None:
        groups.append((EXTENSION_TENSORS, plan.extension_forms, plan.produce_extension))
    return groups


def _write_tensors(plan: ExportPlan, made: Path, max_size: int) -> None:
    """Write this rank's files."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    files = [
        (file, {name: forms[name] for name in names}, produce)
        for stem, forms, produce in _groups(plan)
        for file, names in plan_shards(forms, stem, max_size).items()
    ][rank::world_size]
    total = sum(size_of(form) for _, forms, _ in files for form in forms.values())
    with Progress("export", total, "B", enabled=rank == 0) as progress:
        for file, forms, produce in files:

            def counted(name: str, forms: Forms = forms, produce: Produce = produce) -> torch.Tensor:
                progress.add(size_of(forms[name]))
                return produce(name)

            try:
                write_file(made / file, forms, counted, {"format": "pt"})
            except OSError as error:
                raise CheckpointError(f"{made / file}: cannot be written: {error.strerror or error}") from error


def _write_companions(plan: ExportPlan, made: Path, max_size: int) -> None:
    """Write the files beside the tensors, and check the tensors. Only on rank 0."""
    for stem, forms, _ in _groups(plan):
        index = index_of(plan_shards(forms, stem, max_size), forms)
        if index is not None:
            write_json(made / f"{stem}.safetensors.index.json", index, CheckpointError)
    values = _config(plan, made)
    if plan.architecture.name == hf_format.NAME:
        values = write_companions(plan.config, values, plan.checkpoint, made)
    write_json(made / CONFIG, values, CheckpointError)
    if plan.extension is not None:
        write_json(made / EXTENSION, plan.extension.to_dict(), CheckpointError)
    if plan.note:
        print(plan.note, flush=True)
    print(f"checked tensors: {_check_tensors(plan, made)}", flush=True)


def _finish(plan: ExportPlan, made: Path, out: Path, said_of_logits: str) -> None:
    """Say the rest and give the result its name. Only on rank 0."""
    print(f"checked logits: {said_of_logits}", flush=True)
    print(f"without a place in {plan.architecture.name}: {_said_of_the_rest(plan)}", flush=True)
    os.replace(made, out)


def _said_of_the_rest(plan: ExportPlan) -> str:
    if plan.left_out:
        return f"{len(plan.left_out)} tensors, left out ({', '.join(plan.left_out[:3])} ...)"
    return f"{len(plan.extension_forms)} tensors, kept in {EXTENSION}" if plan.extension else "nothing"


def _config(plan: ExportPlan, made: Path) -> dict[str, Any]:
    """The content of ``config.json``. Also copies the tokenizer's files and ``generation_config.json``: they give the
    ids of special tokens."""
    values = plan.architecture.write(plan.config, plan.foreign)
    folder = _tokenizer_folder(plan)
    if folder is not None:
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, made / name)
    if _has_tokenizer(made):
        tokenizer = load_tokenizer(made)
        values |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    else:
        print("the checkpoint names no tokenizer; put its files beside the model", flush=True)
    if (made / GENERATION_CONFIG).is_file():
        generation = read_json(made / GENERATION_CONFIG, CheckpointError)
        values |= {name: generation[name] for name in SPECIAL_IDS if generation.get(name) is not None}
    return values


def _tokenizer_folder(plan: ExportPlan) -> Path | None:
    """Where the tokenizer is, or else what an import without one kept: the ids of special tokens."""
    candidates = [plan.checkpoint / TOKENIZER]
    if plan.config.tokenizer is not None:
        named = Path(plan.config.tokenizer)
        candidates.append(named if named.is_dir() else named.parent)
    if plan.config.checkpoint.load:
        candidates.append(Path(plan.config.checkpoint.load) / TOKENIZER)
    known = [folder for folder in candidates if (folder / GENERATION_CONFIG).is_file()]
    return next(filter(_has_tokenizer, candidates), known[0] if known else None)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES[:2])


def _check_tensors(plan: ExportPlan, made: Path) -> str:
    """Read tensors of every kind back as any reader would, and compare them with the checkpoint, bit for bit."""
    models = {MODEL: HuggingFaceModel(made)}
    if plan.extension is not None:
        models[EXTENSION_TENSORS] = HuggingFaceModel(made, stem=EXTENSION_TENSORS)
    checked = total = 0
    for stem, forms, produce in _groups(plan):
        found = {name: TensorForm(entry.shape, entry.dtype) for name, entry in models[stem].tensors.items()}
        if found != forms:
            raise CheckpointError(f"{made}: the tensors read back are not the ones that were written")
        total += len(forms)
        kinds: dict[str, str] = {}
        for name in forms:  # the last of each kind: a wrong offset shows most there
            kinds[".".join(part for part in name.split("[")[0].split(".") if not part.isdecimal())] = name
        budget = CHECKED_BYTES
        for name in kinds.values():
            budget -= size_of(forms[name])
            if budget < 0:
                continue
            if not torch.equal(models[stem].read(name), produce(name)):
                raise CheckpointError(f"{made}: tensor {name} differs from what was written")
            checked += 1
    return f"{total} tensors; {checked} of them, of every kind, read back equal bit for bit"


def _check_logits(plan: ExportPlan, made: Path) -> str:
    """Compare the logits of the files with those of the checkpoint; a line about it. Collective."""
    stored = (plan.reader.forms[blocks[0].region.key].dtype for blocks in plan.blocks.values())
    rounded = plan.dtype is not None and any(DTYPES[plan.dtype].itemsize < dtype.itemsize for dtype in stored)
    tolerance = 1e-4 if plan.same_text and not rounded else None
    return check_logits(HuggingFaceModel(made), plan.config, plan.state, tolerance)["said"]
