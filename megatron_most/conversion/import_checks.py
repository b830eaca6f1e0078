"""Checks of a foreign model before it is imported: its tensors are those that its configuration implies."""

from __future__ import annotations

import torch

from megatron_most.conversion.architecture import Architecture, ForeignModel
from megatron_most.conversion.hugging_face import CONFIG, HuggingFaceModel
from megatron_most.conversion.native import EMBEDDING, HEAD
from megatron_most.conversion.tables import HEAD_RULE, TIED_HEAD_RULE
from megatron_most.conversion.weight_map import MAX_ELEMENTS, Block
from megatron_most.errors import CheckpointError


def check_counts(source: HuggingFaceModel, architecture: Architecture, foreign: ForeignModel) -> None:
    """Raise if a count in the configuration exceeds what the files can hold: planning a billion layers never ends."""
    sizes = [size for entry in source.tensors.values() for size in entry.shape]
    counts = {
        "num_hidden_layers": (foreign.model["num_layers"], len(source.tensors)),
        architecture.num_experts.name: (foreign.num_experts, len(source.tensors)),
        "num_key_value_heads": (foreign.model["attention"].get("num_query_groups", 0), max(sizes, default=0)),
    }
    for name, (count, most) in counts.items():
        if count > most:
            raise CheckpointError(f"{source.path_of(CONFIG)}: {name}={count}: the files hold no more than {most}")


def check_tensors(
    source: HuggingFaceModel, architecture: Architecture, foreign: ForeignModel, blocks: list[Block]
) -> dict[str, str]:
    """Check the names and shapes of all tensors of the source.

    Returns:
        What is not imported -> the reason.

    Raises:
        CheckpointError: a tensor is missing, has another shape than the configuration says, or has no place.
    """
    rows: dict[str, int] = {}
    for block in blocks:
        rows[block.name] = max(rows.get(block.name, 0), block.row + block.rows)
    unused: dict[str, str] = {}
    for block in {block.name: block for block in blocks}.values():
        entry = source.tensors.get(block.name)
        if entry is None:
            raise CheckpointError(f"{source.directory}: tensor {block.name} is missing")
        along_ids = block.region.key in (EMBEDDING, HEAD)
        shape = (foreign.vocab_size if along_ids else rows[block.name], *block.shape[1:])
        if entry.shape != shape:
            raise CheckpointError(
                f"{source.directory}: tensor {block.name} has shape {list(entry.shape)}, the configuration says"
                f" {list(shape)}"
            )
        if rows[block.name] < shape[0]:
            unused[f"{block.name}[{rows[block.name]}:{shape[0]}]"] = "ids outside vocab.text_vocab_size"
    for name in sorted(source.tensors.keys() - rows.keys()):
        reason = architecture.reason_unused(name, foreign)
        if reason is None:
            raise CheckpointError(
                f"{source.directory / source.tensors[name].file}: tensor {name} has no place in a"
                f" {architecture.name} model"
            )
        unused[name] = reason
    return unused


def check_tied_head(source: HuggingFaceModel) -> None:
    """Raise if the configuration ties the head to the embedding, but the files hold a head with other values.

    Versions of transformers disagree about such a folder: 4 uses the embedding, 5 the head.
    """
    [head], [embedding] = HEAD_RULE.foreign, TIED_HEAD_RULE.foreign
    if head not in source.tensors:
        return
    shape = source.tensors[embedding].shape
    step = max(1, MAX_ELEMENTS // shape[1])

    def is_same(start: int) -> bool:
        first, second = (source.read(name, start, min(step, shape[0] - start)) for name in (head, embedding))
        return torch.equal(first.float(), second.float())

    if source.tensors[head].shape != shape or not all(is_same(start) for start in range(0, shape[0], step)):
        raise CheckpointError(
            f"{source.path_of(CONFIG)}: tie_word_embeddings=true, but {source.tensors[head].file} holds {head}, which"
            f" differs from {embedding}; set it to false to use {head}, or remove that tensor"
        )
