"""The parts of a model, which may have their own learning rates: names of parameters, freezing, parameter groups.

A part is one of :attr:`megatron_most.config.RunConfig.part_names`. The optimizer has separate parameter groups for each
part, marked ``part``. Two parameters hold two parts each: the rows of text ids and those of audio ids of the
vocabulary's embedding and head (:class:`Table`, :mod:`~megatron_most.training.table_rows`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import ParamGroupOverride, ParamKey
from megatron.core.optimizer.optimizer_config import ParamPredicate
from megatron.core.utils import unwrap_model

from megatron_most.config import RunConfig
from megatron_most.model import MoSTModel
from megatron_most.moe import ExpertGroups

_RULES = (
    # First, because Transformer Engine stores some norms in the linear layer that follows them.
    ("norms", re.compile(r"norm")),
    ("routers", re.compile(r"\.mlp\.router\.")),
    ("shared_experts", re.compile(r"\.mlp\.shared_experts\.")),
    ("dense_ffn", re.compile(r"\.mlp\.linear_fc[12]\.")),
    ("attention", re.compile(r"\.self_attention\.")),
    ("embeddings", re.compile(r"(^|\.)embedding\.")),
    ("embeddings.audio", re.compile(r"(^|\.)codebook_embeddings\.")),
    ("heads", re.compile(r"(^|\.)output_layer\.")),
    ("heads.audio", re.compile(r"(^|\.)codebook_heads\.")),
)
_TABLE = re.compile(r"(^|\.)(embedding\.word_embeddings|output_layer)\.weight$")
_AUDIO = ".audio"
_EXPERTS = re.compile(r"\.mlp\.experts\.")
_EXPERT_POOL = re.compile(r"\.mlp\.experts\.(.+)_experts\.linear_fc[12]$")
"""One weight per pool: :class:`megatron_most.moe.experts.GroupedExperts`."""
_EXPERT_INDEX = re.compile(r"\.local_experts\.(\d+)\.|\.linear_fc[12]\.weight(\d+)$")
"""One weight per local expert: Megatron's ``SequentialMLP`` and Transformer Engine's grouped layers."""


@dataclass(frozen=True)
class Table:
    """The embedding or the head of all ids: a parameter of two parts.

    Args:
        pieces: (part, its elements of the flat parameter), rows of text ids first. With tensor parallelism, a rank's
            rows may all belong to one part; the other piece is empty.
    """

    parameter: torch.nn.Parameter
    pieces: tuple[tuple[str, slice], tuple[str, slice]]


def find_tables(config: RunConfig, chunks: Iterable[torch.nn.Module]) -> list[Table]:
    """The tables of this rank's model chunks, wrapped or not."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    found = []
    for name, parameter, part in named_parts(config, chunks):
        if _TABLE.search(name):
            rows, width = parameter.shape
            edge = min(max(config.vocab.text_vocab_size - rank * rows, 0), rows) * width
            pieces = ((part, slice(0, edge)), (part + _AUDIO, slice(edge, rows * width)))
            found.append(Table(parameter, pieces))
    return found


def named_parts(config: RunConfig, chunks: Iterable[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter, str]]:
    """(name, parameter, part) of every parameter of this rank's model chunks, wrapped or not.

    The part of a table is that of its text ids.
    """
    expert = config.parallel.expert_model_parallel_size
    groups = ExpertGroups.from_config(config.model.moe, expert)
    local = groups.local_experts(parallel_state.get_expert_model_parallel_rank())
    pools = [pool for pool, experts in local.items() for _ in experts]
    for chunk in chunks:
        tied = _shared_weight(chunk)
        for name, parameter in chunk.named_parameters():
            yield name, parameter, "embeddings" if parameter is tied else part_of(name, pools)


def _shared_weight(chunk: torch.nn.Module) -> torch.nn.Parameter | None:
    """The matrix that is embedding and output head, where the model has one and this stage holds it."""
    model = unwrap_model(chunk)
    return model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None


def is_expert(name: str) -> bool:
    """Whether a routed expert has the parameter ``name``."""
    return _EXPERTS.search(name) is not None


def part_of(name: str, pools: list[str]) -> str:
    """The part of the parameter ``name``, of a table that of its text ids. ``pools``: the pool of each local expert."""
    if is_expert(name):
        return f"experts.{_pool_of(name, pools)}"
    for part, pattern in _RULES:
        if pattern.search(name):
            return part
    raise RuntimeError(f"{name}: belongs to no part of the model")


def _pool_of(name: str, pools: list[str]) -> str:
    if match := _EXPERT_POOL.search(name):
        return match[1]
    match = _EXPERT_INDEX.search(name)
    if match is None:
        raise RuntimeError(f"{name}: names neither a pool nor an expert")
    return pools[int(match[1] or match[2])]


def freeze(config: RunConfig, chunks: Iterable[MoSTModel]) -> None:
    """Freeze the parts with a learning-rate scale of 0: no gradients, no optimizer state.

    A table of which one part learns has both, on every rank, whichever rows it has.

    The output of frozen embeddings still requires a gradient in two cases. If layers above them learn, every rank must
    take part in the backward of the all-to-all, even if it has nothing to learn. If layers are recomputed, they run
    with gradients only if their input requires one, and routing is counted in that pass.
    """
    for name, parameter, part in named_parts(config, chunks):
        if config.lr_scale(_leading_part(config, name, part)) == 0:
            parameter.requires_grad_(False)
    learning = {part.removesuffix(_AUDIO) for part in config.part_names if config.lr_scale(part) > 0}
    layers_learn = bool(learning - {"embeddings", "heads"})
    is_recomputed = config.training.recompute != "none"
    if "embeddings" not in learning and (layers_learn or is_recomputed):
        for chunk in chunks:
            if chunk.pre_process:
                chunk.embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())


def _leading_part(config: RunConfig, name: str, part: str) -> str:
    """The part at whose rate a parameter is updated: of a table, the one with the higher rate."""
    both = (part, part + _AUDIO) if _TABLE.search(name) else (part,)
    return max(both, key=config.lr_scale)


def group_overrides(config: RunConfig, chunks: Iterable[torch.nn.Module]) -> dict[ParamKey, ParamGroupOverride]:
    """Overrides for the parameter groups of each part: its name and its minimum and maximum learning rate."""
    options = config.optimizer
    members: dict[str, set[torch.nn.Parameter]] = {part: set() for part in config.part_names}
    for name, parameter, part in named_parts(config, chunks):
        members[_leading_part(config, name, part)].add(parameter)
    overrides = {}
    for part, parameters in members.items():
        override: dict[str, Any] = {"part": part}
        scale = config.lr_scale(part)
        if scale != 1:
            override |= {"max_lr": options.lr * scale, "min_lr": options.min_lr * scale}
        overrides[ParamKey(predicate=ParamPredicate(part, parameters.__contains__))] = override
    return overrides
