"""Rows of the vocabulary's tables: the text ids of a table are one part of the model, its audio ids another.

Both are in one parameter, with one gradient and one state of the optimizer. What sets the parts apart is done by row:

- Gradients of frozen rows are set to zero after the reduction, so that no norm and no clipping sees them.
- The parameter's group has the higher of the two learning rates. After an update, rows of the part with the lower rate
  keep that share of their change: an update of AdamW, with its weight decay, is proportional to the learning rate.
  Frozen rows get the values back that they had, bit for bit, whatever moments they have from an earlier run.

Shape letters: n elements of a parameter that this rank's optimizer updates, all of it or a data-parallel share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_most.config import RunConfig
from megatron_most.training.parts import Table


@dataclass(frozen=True)
class OwnRows:
    """The rows of one part in what an optimizer updates.

    Args:
        main: ``[n]`` flat, or the whole parameter: the tensor in the optimizer's parameter group.
        elements: of ``main``, flat.
    """

    part: str
    main: torch.Tensor
    elements: slice

    @property
    def values(self) -> torch.Tensor:
        return self.main.detach().view(-1)[self.elements]

    @property
    def gradient(self) -> torch.Tensor | None:
        return None if self.main.grad is None else self.main.grad.view(-1)[self.elements]


def own_rows(tables: Iterable[Table], member: MegatronOptimizer) -> list[OwnRows]:
    """The rows of every part of the tables that ``member``, one of the chained optimizers, updates on this rank."""
    mine = {id(main) for group in member.param_groups for main in group["params"]}
    if not mine:
        return []  # a rank on which everything is frozen has an optimizer without parameters
    found = []
    for table in tables:
        main, first = _main_of(member, table.parameter)
        if id(main) not in mine:
            continue
        assert main is not None
        for part, elements in table.pieces:
            start, stop = (min(max(edge - first, 0), main.numel()) for edge in (elements.start, elements.stop))
            if start < stop:
                found.append(OwnRows(part, main, slice(start, stop)))
    return found


def _main_of(member: MegatronOptimizer, parameter: torch.nn.Parameter) -> tuple[torch.Tensor | None, int]:
    """The tensor that is updated in place of a parameter, and the element of the parameter with which it begins."""
    if isinstance(member, DistributedOptimizer):
        if parameter not in member.model_param_group_index_map:
            return None, 0
        group, place = member.model_param_group_index_map[parameter]
        main = member.optimizer.param_groups[group]["params"][place]
        return main, member._get_model_param_range_map(parameter)["param"].start
    return getattr(parameter, "main_param", parameter), 0


def drop_frozen_gradients(config: RunConfig, tables: Iterable[Table]) -> None:
    """Set the gradients of frozen rows to zero. Call it after the gradients have been reduced."""
    for table in tables:
        for elements in _frozen(config, table):
            table.parameter.main_grad.view(-1)[elements].zero_()  # type: ignore[attr-defined]  # a view of the buffer


def _frozen(config: RunConfig, table: Table) -> Iterator[slice]:
    if table.parameter.requires_grad:
        yield from (elements for part, elements in table.pieces if config.lr_scale(part) == 0)


def set_row_rates(config: RunConfig, tables: Iterable[Table], optimizer: MegatronOptimizer) -> None:
    """Let every update of ``optimizer`` move the rows of each part at the part's own rate."""
    for member in optimizer.chained_optimizers:
        slower = [
            (rows, ratio)
            for rows in own_rows(tables, member)
            if (ratio := config.lr_scale(rows.part) / _rate_of_group(config, rows)) < 1
        ]
        if slower:
            _Slower(slower).attach(member.optimizer)


def _rate_of_group(config: RunConfig, rows: OwnRows) -> float:
    text = rows.part.removesuffix(".audio")
    return max(config.lr_scale(text), config.lr_scale(f"{text}.audio"))


class _Slower:
    """Takes back a part of what an update did to rows; the copies live as long as the update."""

    def __init__(self, rows: list[tuple[OwnRows, float]]) -> None:
        self._rows = rows
        self._before: list[torch.Tensor] = []

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        # Around the step itself: Megatron calls it after clipping, and not at all if the update is skipped.
        optimizer.register_step_pre_hook(self._keep)
        optimizer.register_step_post_hook(self._take_back)

    def _keep(self, *_: Any) -> None:
        self._before = [rows.values.clone() for rows, _ in self._rows]

    @torch.no_grad()
    def _take_back(self, *_: Any) -> None:
        for (rows, ratio), before in zip(self._rows, self._before, strict=True):
            rows.values.copy_(before.lerp_(rows.values, ratio) if ratio else before)
        self._before = []
