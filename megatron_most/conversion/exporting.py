"""Native checkpoint -> Hugging Face folder, streamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_most import parallel, platform
from megatron_most.checkpointing import directory as directories
from megatron_most.checkpointing.region_io import TensorForm
from megatron_most.config import ParallelConfig
from megatron_most.conversion import hf_format
from megatron_most.conversion.export_plan import ExportPlan, plan_export
from megatron_most.conversion.extension import EXTENSION, EXTENSION_TENSORS
from megatron_most.conversion.hf_folder import write_companions
from megatron_most.conversion.hugging_face import CONFIG, MODEL, TOKENIZER_FILES, HuggingFaceModel
from megatron_most.conversion.importing import CHECKED_BYTES, TOKENIZER, require_space
from megatron_most.conversion.progress import Progress
from megatron_most.conversion.safetensors_files import index_of, parse_size, plan_shards, size_of, write_file
from megatron_most.conversion.verification import check_logits, is_small
from megatron_most.errors import CheckpointError
from megatron_most.files import write_text
from megatron_most.text import load_tokenizer


def export_model(
    checkpoint: str | Path,
    out: str | Path,
    name: str,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    experts: str = "text",
    with_extension: bool = True,
) -> Path:
    """Convert a native checkpoint into the folder ``out``. Collective under ``torchrun``: ranks share out the files.

    Raises:
        ConfigError, CheckpointError: one line; ``out`` is not there then.
    """
    out = Path(out)
    max_size = parse_size(max_shard_size)
    platform.install()
    parallel.initialize(ParallelConfig(), seed=0)
    try:
        plan = parallel.together(lambda: _plan(checkpoint, out, name, dtype, experts, with_extension))
        rank, world_size = dist.get_rank(), dist.get_world_size()
        parallel.together(lambda: directories.verify_checksums(plan.checkpoint, rank, world_size))
        made = directories.temporary_directory(out)
        parallel.on_rank_zero(lambda: _prepare(made))
        try:
            parallel.together(lambda: _write_tensors(plan, made, max_size))
            parallel.on_rank_zero(lambda: _finish(plan, made, out, max_size))
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
        raise CheckpointError(f"{out}: exists already; name a directory that does not")
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


Group = tuple[str, dict[str, TensorForm], Callable[[str], torch.Tensor]]


def _groups(plan: ExportPlan) -> list[Group]:
    """Stem of the files, what goes into them, and how it is made."""
    groups: list[Group] = [(MODEL, plan.forms, plan.produce)]
    if plan.extension is not None:
        groups.append((EXTENSION_TENSORS, plan.extension_forms, plan.produce_extension))
    return groups


def _write_tensors(plan: ExportPlan, made: Path, max_size: int) -> None:
    """This rank's share of the files."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    files = [
        (file, {name: forms[name] for name in names}, produce)
        for stem, forms, produce in _groups(plan)
        for file, names in plan_shards(forms, stem, max_size).items()
    ][rank::world_size]
    total = sum(size_of(form) for _, forms, _ in files for form in forms.values())
    progress = Progress("export", total, rank == 0)
    for file, forms, produce in files:

        def counted(name: str, forms: dict = forms, produce: Callable = produce) -> torch.Tensor:
            progress.add(size_of(forms[name]))
            return produce(name)

        try:
            write_file(made / file, forms, counted, {"format": "pt"})
        except OSError as error:
            raise CheckpointError(f"{made / file}: cannot be written: {error.strerror or error}") from error
    progress.done()


def _finish(plan: ExportPlan, made: Path, out: Path, max_size: int) -> None:
    """What stands beside the tensors, the checks, and the name that says it is whole; on rank 0."""
    for stem, forms, _ in _groups(plan):
        index = index_of(plan_shards(forms, stem, max_size), forms)
        if index is not None:
            write_text(made / f"{stem}.safetensors.index.json", index)
    values = _config(plan, made)
    if plan.architecture.name == hf_format.NAME:
        values = write_companions(plan.config, values, plan.checkpoint, made)
    write_text(made / CONFIG, json.dumps(values, indent=2) + "\n")
    if plan.extension is not None:
        write_text(made / EXTENSION, json.dumps(plan.extension.to_dict(), indent=1) + "\n")
    if plan.note:
        print(plan.note, flush=True)
    print(f"checked tensors: {_check_tensors(plan, made)}", flush=True)
    print(f"checked logits: {_check_logits(plan, made)['said']}", flush=True)
    kept = f"{len(plan.extension_forms)} tensors are beside the model in {EXTENSION}" if plan.extension else "none"
    left = f"; left out: {len(plan.left_out)} ({', '.join(list(plan.left_out)[:3])} ...)" if plan.left_out else ""
    print(f"what {plan.architecture.name} has no place for: {kept if not left else 'given up'}{left}", flush=True)
    os.replace(made, out)


def _config(plan: ExportPlan, made: Path) -> dict[str, Any]:
    """``config.json``; the tokenizer's files are copied, and give the special ids."""
    values = plan.architecture.write(plan.config, plan.foreign)
    folder = _tokenizer_folder(plan)
    if folder is None:
        print("no tokenizer is known to the checkpoint; put its files beside the model", flush=True)
        return values
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, made / name)
    tokenizer = load_tokenizer(made)
    return {**values, "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}


def _tokenizer_folder(plan: ExportPlan) -> Path | None:
    candidates = [plan.checkpoint / TOKENIZER]
    if plan.config.tokenizer is not None:
        named = Path(plan.config.tokenizer)
        candidates.append(named if named.is_dir() else named.parent)
    known = (folder for folder in candidates if any((folder / name).is_file() for name in TOKENIZER_FILES[:2]))
    return next(known, None)


def _check_tensors(plan: ExportPlan, made: Path) -> str:
    """Open the folder as any reader would, and compare tensors of every kind with the checkpoint, bit for bit."""
    models = {MODEL: HuggingFaceModel(made)}
    if plan.extension is not None:
        models[EXTENSION_TENSORS] = HuggingFaceModel(made, stem=EXTENSION_TENSORS)
    checked = total = 0
    for stem, forms, produce in _groups(plan):
        found = {name: TensorForm(entry.shape, entry.dtype) for name, entry in models[stem].tensors.items()}
        if found != forms:
            raise CheckpointError(f"{made}: the tensors read back are not those that were written")
        total += len(forms)
        kinds: dict[str, str] = {}
        for name in forms:  # the last of a kind stands farthest from where a mistake in counting starts
            kinds[".".join(part for part in name.split("[")[0].split(".") if not part.isdecimal())] = name
        budget = CHECKED_BYTES
        for name in kinds.values():
            budget -= size_of(forms[name])
            if budget < 0:
                continue
            if not torch.equal(models[stem].read(name), produce(name)):
                raise CheckpointError(f"{made}: tensor {name} is not what was written")
            checked += 1
    return f"{total} tensors; {checked} of them, of every kind, read back equal bit for bit"


def _check_logits(plan: ExportPlan, made: Path) -> dict[str, Any]:
    if dist.get_world_size() > 1:
        return {"said": "not compared under torchrun; most convert verify does"}
    if not is_small(plan.config):
        return {"said": "not compared, the model is not small; most convert verify does"}
    stored = plan.reader.forms
    rounded = any(form.dtype.itemsize < stored[plan.blocks[name][0].region.key].dtype.itemsize
                  for name, form in plan.forms.items())  # fmt: skip
    tolerance = 1e-4 if plan.same_text and not rounded else None
    return check_logits(HuggingFaceModel(made), plan.config, plan.state, tolerance)
