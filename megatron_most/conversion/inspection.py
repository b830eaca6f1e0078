"""Describes a directory: a native checkpoint or a Hugging Face model, its parts, and whether it is complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_most.checkpointing import directory as directories
from megatron_most.checkpointing import read_metadata, resolve
from megatron_most.checkpointing.directory import STATE
from megatron_most.checkpointing.regions import StateReader
from megatron_most.conversion.architectures import read_foreign
from megatron_most.conversion.export_plan import stored_config
from megatron_most.conversion.extension import EXTENSION, Extension
from megatron_most.conversion.hugging_face import CONFIG, HuggingFaceModel
from megatron_most.conversion.import_plan import RECORD
from megatron_most.conversion.native import native_shapes
from megatron_most.conversion.safetensors_files import size_of
from megatron_most.errors import CheckpointError
from megatron_most.files import read_json
from megatron_most.moe import ExpertGroups
from megatron_most.vocab import VocabLayout

Facts = dict[str, Any]


def describe(path: Path, checksums: bool = False, allow_pickle: bool = False) -> Facts:
    """Facts about ``path``: name -> text of one line.

    Args:
        path: a native checkpoint, a run directory (for its newest checkpoint), or a Hugging Face folder.
        checksums: read all files of a native checkpoint and compare them with its checksums.
        allow_pickle: read ``pytorch_model.bin`` of a Hugging Face folder without safetensors; weights only.

    Raises:
        CheckpointError: it is neither, or it is broken.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory")
    if (path / CONFIG).is_file():
        return _hugging_face(path, allow_pickle)
    return _native(resolve(path), checksums)


def _hugging_face(path: Path, allow_pickle: bool) -> Facts:
    model = HuggingFaceModel(path, allow_pickle)
    architecture, foreign = read_foreign(model.config, str(path / CONFIG))
    extension = Extension.read(model)
    shape = foreign.model
    facts = {
        "kind": "Hugging Face model",
        "format": architecture.name,
        "layers": f"{shape['num_layers']} of width {shape['hidden_size']}",
        "attention": shape["attention"]["type"],
        "experts": f"{foreign.num_experts}, top-{foreign.top_k}" if foreign.num_experts else "none (dense)",
    }
    if foreign.choices:
        names = ("text", "audio")
        facts["groups"] = ", ".join(
            f"{name} {list(experts)}" for name, experts in zip(names, foreign.choices, strict=True)
        )
    types = sorted({str(entry.dtype).removeprefix("torch.") for entry in model.tensors.values()})
    facts |= {
        "ids": foreign.vocab_size,
        "tensors": f"{len(model.tensors)} in {len({entry.file for entry in model.tensors.values()})} files",
        "size": f"{model.num_bytes / 1e9:.3f} GB, {', '.join(types)}",
        "extension": "none" if extension is None else f"{len(extension.regions)} tensors, {EXTENSION}",
        "integrity": "index and headers match the files; the format has no checksums",
    }
    return facts


def _native(path: Path, checksums: bool) -> Facts:
    metadata = read_metadata(path)
    config = stored_config(path, metadata)
    if checksums:
        directories.verify_checksums(path)
    model, moe, vocab = config.model, config.model.moe, VocabLayout(**metadata.config["vocab"])
    forms = StateReader(path / STATE).forms
    shapes = native_shapes(config)
    wrong = [key for key, shape in shapes.items() if key not in forms or forms[key].shape != shape]
    if wrong:
        raise CheckpointError(f"{path}: {wrong[0]} is missing or has another shape than the configuration says")
    weights = sum(size_of(forms[key]) for key in shapes)
    optimizer = sum(size_of(form) for key, form in forms.items() if key.startswith("optimizer."))
    groups = ExpertGroups.from_config(moe)
    pools = ", ".join(f"{name} {_short(experts)}" for name, experts in groups.pools.items())
    sizes = {name: metadata.config["parallel"].get(name) for name in config.parallel.sizes}
    layout = {name: value for name, value in sizes.items() if value not in (1, None)}
    record = read_json(path / RECORD, CheckpointError) if (path / RECORD).is_file() else None
    origin = f"{record['source']['architecture']}, {record['experts']}" if record else "training"
    types = sorted({str(forms[key].dtype).removeprefix("torch.") for key in shapes})
    sums = "files complete, checksums right" if checksums else "files complete; --checksums verifies their content"
    return {
        "kind": "native checkpoint",
        "directory": str(path),
        "made by": origin,
        "step": f"{metadata.step}, {metadata.consumed_tokens} tokens",
        "layers": f"{model.num_layers} of width {model.hidden_size}, {model.first_k_dense_replace} dense",
        "attention": model.attention.type,
        "experts": f"{moe.num_experts} in logical order: {pools}",
        "top-k": ", ".join(f"{group.modality} {group.moe_router_topk}" for group in moe.groups),
        "expert order": f"{moe.expert_order} (of the run; the checkpoint is in logical order)",
        "vocabulary": f"{vocab.text_vocab_size} text ids, layout {vocab.layout}, {vocab.num_codebooks} codebooks of"
        f" {vocab.codebook_size}, {vocab.size} ids in all",
        "saved by": f"{metadata.world_size} ranks, {layout or 'not split'}",
        "weights": f"{weights / 1e9:.3f} GB, {', '.join(types)}",
        "optimizer": f"{optimizer / 1e9:.3f} GB" if optimizer else "none",
        "tokenizer": metadata.tokenizer.name if metadata.tokenizer else "none",
        "integrity": sums,
    }


def _short(experts: tuple[int, ...]) -> str:
    """Consecutive experts as ``0..31``, others as a list."""
    if experts == tuple(range(experts[0], experts[0] + len(experts))):
        return f"{experts[0]}..{experts[-1]}"
    return str(list(experts))
