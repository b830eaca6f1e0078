"""The parts of a model, which may have their own learning rates: names of parameters, freezing, gradient norms.

A part is one of :attr:`megatron_most.config.RunConfig.part_names`. The optimizer has separate parameter groups for each
part, marked ``part``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.optimizer import MegatronOptimizer, ParamGroupOverride, ParamKey
from megatron.core.optimizer.optimizer_config import ParamPredicate
from megatron.core.transformer.module import param_is_not_shared

from megatron_most import platform
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
    ("embeddings", re.compile(r"(^|\.)(embedding|codebook_embeddings)\.")),
    ("heads", re.compile(r"(^|\.)(output_layer|codebook_heads)\.")),
)
_EXPERTS = re.compile(r"\.mlp\.experts\.")
_EXPERT_POOL = re.compile(r"\.mlp\.experts\.(.+)_experts\.linear_fc[12]$")
"""One weight per pool: :class:`megatron_most.moe.experts.GroupedExperts`."""
_EXPERT_INDEX = re.compile(r"\.local_experts\.(\d+)\.|\.linear_fc[12]\.weight(\d+)$")
"""One weight per local expert: Megatron's ``SequentialMLP`` and Transformer Engine's grouped layers."""


def named_parts(config: RunConfig, chunks: Iterable[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter, str]]:
    """(name, parameter, part) of every parameter of this rank's model chunks, wrapped or not."""
    expert = config.parallel.expert_model_parallel_size
    groups = ExpertGroups.from_config(config.model.moe, expert)
    local = groups.local_experts(parallel_state.get_expert_model_parallel_rank())
    pools = [pool for pool, experts in local.items() for _ in experts]
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            yield name, parameter, part_of(name, pools)


def is_expert(name: str) -> bool:
    """Whether a routed expert has the parameter ``name``."""
    return _EXPERTS.search(name) is not None


def part_of(name: str, pools: list[str]) -> str:
    """The part of the parameter ``name``. ``pools`` is the pool of each local expert."""
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

    The output of frozen embeddings still requires a gradient in two cases. If layers above them learn, every rank must
    take part in the backward of the all-to-all, even if it has nothing to learn. If layers are recomputed, they run
    with gradients only if their input requires one, and routing is counted in that pass.
    """
    for _, parameter, part in named_parts(config, chunks):
        if config.lr_scale(part) == 0:
            parameter.requires_grad_(False)
    layers_learn = any(config.lr_scale(part) > 0 for part in config.part_names if part not in ("embeddings", "heads"))
    is_recomputed = config.training.recompute != "none"
    if config.lr_scale("embeddings") == 0 and (layers_learn or is_recomputed):
        for chunk in chunks:
            if chunk.pre_process:
                chunk.embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())


def group_overrides(config: RunConfig, chunks: Iterable[torch.nn.Module]) -> dict[ParamKey, ParamGroupOverride]:
    """Overrides for the parameter groups of each part: its name and its minimum and maximum learning rate."""
    options = config.optimizer
    members: dict[str, set[torch.nn.Parameter]] = {part: set() for part in config.part_names}
    for _, parameter, part in named_parts(config, chunks):
        members[part].add(parameter)
    overrides = {}
    for part, parameters in members.items():
        override: dict[str, Any] = {"part": part}
        scale = config.lr_scale(part)
        if scale != 1:
            override |= {"max_lr": options.lr * scale, "min_lr": options.min_lr * scale}
        overrides[ParamKey(predicate=ParamPredicate(part, parameters.__contains__))] = override
    return overrides


@torch.no_grad()
def part_grad_norms(config: RunConfig, optimizer: MegatronOptimizer) -> dict[str, float]:
    """L2 norm of the gradient of each trainable part, before clipping; the same on every rank. Collective.

    Call it after the backward pass and before ``optimizer.step()``. Like Megatron's total norm, it reads the gradients
    that the optimizer holds: shards in a distributed optimizer, whole gradients otherwise.
    """
    parts = [part for part in config.part_names if config.lr_scale(part) > 0]
    optimizer.prepare_grads()
    total = torch.zeros(len(parts), dtype=torch.float64, device=platform.device())
    for member in optimizer.chained_optimizers:
        squares = torch.zeros_like(total)
        for group in member.param_groups:
            grads = [parameter.grad for parameter in group["params"] if _counts(parameter, member.tp_group)]
            if grads:
                norms = torch.stack(torch._foreach_norm(grads))
                squares[parts.index(group["part"])] += norms.double().square().sum()
        dist.all_reduce(squares, group=member.get_grad_stats_parallel_group())
        total += squares
    return {part: math.sqrt(square) for part, square in zip(parts, total.tolist(), strict=True)}


def _counts(parameter: torch.nn.Parameter, tensor_group: dist.ProcessGroup) -> bool:
    """Whether this rank includes the parameter in a sum over ranks: of all ranks with a copy, exactly one does."""
    return (
        parameter.grad is not None
        and param_is_not_shared(parameter)
        and tensor_parallel.param_is_not_tensor_parallel_duplicate(parameter, tensor_group)
    )
