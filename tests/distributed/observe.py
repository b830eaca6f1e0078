"""What a few training steps compute under one layout, and whether two layouts compute the same."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from megatron_most import parallel
from megatron_most.config import RunConfig
from megatron_most.data.loading.batch import Batch
from megatron_most.model import build_model
from megatron_most.moe import collect_routing
from megatron_most.training.microbatches import sum_over_ranks
from megatron_most.training.part_norms import part_grad_norms
from megatron_most.training.train_step import build_train_state, compute_gradients, train_step, update_weights
from tests.distributed.shards import Piece, assemble, fill_weights, local_pieces
from tests.distributed.tiny import tiny_batch, tiny_config

ROWS = 4
"""Rows of a global batch, whatever the layout."""

STEADY = {"optimizer__lr": 1e-2, "optimizer__adam_eps": 1e-3}
"""AdamW's first step is lr * g / (|g| + eps): this eps keeps rounding of tiny gradients from becoming whole steps."""

BatchMaker = Callable[[RunConfig, int], list[Batch]]
"""(configuration, step) -> all micro-batches of the step, for all data-parallel ranks."""


@dataclasses.dataclass
class Observation:
    """Of the first step: metric table, routing, gradient norms and this rank's pieces of every gradient.

    Of later steps: this rank's pieces of the weights, after step 2 and the last one.
    """

    table: list[list[float]]
    routing: list[dict[str, Any]]
    grad_norm: float
    part_norms: dict[str, float]
    gradients: list[Piece]
    weights: dict[int, list[Piece]]


def mixed_batches(config: RunConfig, step: int) -> list[Batch]:
    """:data:`ROWS` rows of text, audio and padding; the same whatever the micro-batch size."""
    rows = [tiny_batch(config, seed=1000 * step + row, rows=1) for row in range(ROWS)]
    size = config.training.micro_batch_size
    return [stack(rows[start : start + size]) for start in range(0, ROWS, size)]


def stack(batches: Sequence[Batch]) -> Batch:
    """One batch with the rows of all of them."""
    if len(batches) == 1:
        return batches[0]
    fields = {field.name: [getattr(batch, field.name) for batch in batches] for field in dataclasses.fields(Batch)}
    return Batch(**{name: None if values[0] is None else torch.cat(values) for name, values in fields.items()})


def observe(overrides: dict[str, Any], num_steps: int = 5, batches_of: BatchMaker = mixed_batches) -> Observation:
    """Train ``num_steps`` steps with weights and batches that depend on nothing but the names and the step."""
    config = tiny_config(**{**STEADY, **overrides})
    parallel.initialize(config.parallel, seed=1)
    state = build_train_state(config, fill_weights)
    first: dict[str, Any] = {}
    weights = {}
    for step in range(num_steps):
        batches = own_share(batches_of(config, step))
        if first:
            train_step(state, batches)
        else:
            first = {
                "table": sum_over_ranks(compute_gradients(state, batches)),
                "routing": collect_routing(state.model_chunks, config.model),
                "part_norms": part_grad_norms(config, state.wrapped, state.optimizer),
                "gradients": _gradients(config, state.wrapped, state.model_chunks),
            }
            first["grad_norm"], _ = update_weights(state)
        if step + 1 in (2, num_steps):
            weights[step + 1] = _copies(state.model_chunks)
    return Observation(**first, weights=weights)


def starting_weights(overrides: dict[str, Any]) -> list[Piece]:
    """This rank's pieces of the weights that :func:`observe` starts with."""
    config = tiny_config(**overrides)
    parallel.initialize(config.parallel, seed=1)
    chunks = build_model(config)
    fill_weights(chunks)
    return _copies(chunks)


def own_share(batches: list[Batch]) -> list[Batch]:
    """The micro-batches that this data-parallel rank takes of a global batch."""
    dp_rank, dp_size = parallel.data_parallel_place()
    return batches[dp_rank::dp_size]


def observe_each(
    runs: Iterable[tuple[dict[str, Any], int]], batches_of: BatchMaker = mixed_batches
) -> list[Observation]:
    """:func:`observe` of each (overrides, number of steps), one after another in the same ranks."""
    return [observe(overrides, num_steps, batches_of) for overrides, num_steps in runs]


def _copies(chunks: list[torch.nn.Module]) -> list[Piece]:
    return [(key, shape, at, view.detach().clone()) for key, shape, at, view in local_pieces(chunks)]


def _gradients(config: RunConfig, wrapped: list[DistributedDataParallel], chunks: list[torch.nn.Module]) -> list[Piece]:
    """Pieces of the gradients of all weights that have one."""
    if config.optimizer.use_distributed_optimizer:
        # A rank has reduced gradients in its share of each bucket only.
        for chunk in wrapped:
            for buffer in chunk.buffers + chunk.expert_parallel_buffers:
                for bucket in buffer.buckets:
                    group = buffer.data_parallel_group
                    share = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                    whole = torch.empty_like(bucket.grad_data)
                    dist.all_gather_into_tensor(whole, share, group=group)
                    bucket.grad_data.copy_(whole)
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    weights = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(parameter.main_grad if parameter.requires_grad else torch.zeros_like(parameter))
        gradients = _copies(chunks)
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)
    return gradients


def assert_same(
    ranks: Sequence[Observation],
    expected: Observation,
    losses: float = 1e-6,
    gradients: float = 1e-6,
    weights: float = 1e-5,
) -> None:
    """The ranks' observations together are those of one process.

    Tolerances: ``losses`` relative, ``gradients`` in units of the largest, ``weights`` absolute.
    """
    for rank in ranks:
        assert_close(rank.table, expected.table, losses, "loss table")
        assert_close(_without_layout(rank.routing), _without_layout(expected.routing), losses, "routing")
        assert_close(rank.grad_norm, expected.grad_norm, 1e-5, "gradient norm")
        assert_close(rank.part_norms, expected.part_norms, 1e-5, "gradient norm")
        parts = math.sqrt(sum(norm**2 for norm in rank.part_norms.values()))
        assert_close(parts, rank.grad_norm, 1e-5, "gradient norm of all parts")
    assert_same_tensors([rank.gradients for rank in ranks], [expected.gradients], gradients, relative=True)
    steps = [step for step in ranks[0].weights if step in expected.weights]
    assert steps, "no step after which both have weights"
    for step in steps:
        assert_same_tensors([rank.weights[step] for rank in ranks], [expected.weights[step]], weights, relative=False)


def assert_same_tensors(
    pieces: Sequence[list[Piece]], expected_pieces: Sequence[list[Piece]], tolerance: float, relative: bool
) -> None:
    whole, expected = assemble(pieces), assemble(expected_pieces)
    assert whole.keys() == expected.keys()
    unit = max(tensor.abs().max().item() for tensor in expected.values()) if relative else 1.0
    assert unit > 0
    for name, tensor in expected.items():
        difference = (whole[name] - tensor).abs().max().item() / unit
        assert difference <= tolerance, f"{name}: differs by {difference:.1e}"


def assert_close(value: Any, expected: Any, tolerance: float, where: str) -> None:
    """Nested dicts and lists of numbers: whole numbers equal, others within a relative ``tolerance``."""
    if isinstance(expected, dict):
        assert value.keys() == expected.keys(), where
        for key in expected:
            assert_close(value[key], expected[key], tolerance, f"{where}, {key}")
    elif isinstance(expected, list):
        assert len(value) == len(expected), where
        for index, (mine, other) in enumerate(zip(value, expected, strict=True)):
            assert_close(mine, other, tolerance, f"{where}[{index}]")
    elif isinstance(expected, float) and expected % 1:
        assert value == pytest.approx(expected, rel=tolerance, abs=1e-9), where
    else:
        assert value == expected, where


def _without_layout(routing: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Routing statistics but for the imbalance of expert-parallel ranks, which is a property of the layout."""
    return [{key: value for key, value in layer.items() if key != "rank_imbalance"} for layer in routing]
