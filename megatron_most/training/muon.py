"""Muon (arXiv 2502.16982) for every matrix, including those stacked in one parameter, as the experts of a pool are.

Megatron's Muon updates parameters with two axes and leaves the others to AdamW, which would be most of a mixture of
experts. Here each matrix of a stack is orthogonalized separately, as if it were a parameter of its own.

Shape letters: e matrices of a stack; out, in: rows and columns of one of them (on this rank).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.optimizer import ParamKey
from megatron.core.optimizer.emerging_optimizers import _EMERGING_OPTIMIZERS, TensorParallelMuon
from megatron.core.optimizer.optimizer_config import ParamPredicate

from megatron_most import platform
from megatron_most.config import RunConfig
from megatron_most.training.parts import named_parts

STACKED_MUON = "stacked_muon"
"""The name under which :class:`StackedMuon` is registered with Megatron's optimizers."""


class StackedMuon(TensorParallelMuon):
    """Megatron's Muon, also for stacks of matrices. Sharded matrices are gathered before they are orthogonalized."""

    def orthogonalize(self, p: torch.Tensor, grad: torch.Tensor, **group: Any) -> torch.Tensor:
        """The update of ``p`` from its momentum ``grad``, both ``[out, in]`` or ``[e, out, in]``."""
        if grad.ndim == 2:
            return super().orthogonalize(p, grad, **group)
        tensor_group = self.pg_collection.expt_tp if getattr(p, "expert_tp", False) else self.pg_collection.tp
        axis = getattr(p, "partition_dim", -1)
        # A negative axis is the same for a stack and for each of its matrices.
        return self.scaled_orthogonalize_fn(grad, tensor_group, None if axis < 0 else axis - grad.ndim)


def _is_left_to_adam(parameter: torch.nn.Parameter) -> bool:
    return not getattr(parameter, "uses_muon", False)


_EMERGING_OPTIMIZERS[STACKED_MUON] = dataclasses.replace(
    _EMERGING_OPTIMIZERS["muon"],
    optimizer_cls=StackedMuon,
    default_param_overrides={
        ParamKey(predicate=ParamPredicate(name="left_to_adam", fn=_is_left_to_adam)): {"optimizer": "adam"}
    },
)


def check_muon(config: RunConfig) -> None:
    """Raise :class:`ConfigError` if the optimizer needs a library that is not installed. Allocates nothing."""
    if config.optimizer.optimizer == "muon":
        platform.require_library("emerging_optimizers", "optimizer.optimizer", "muon")


def muon_options(config: RunConfig, chunks: Iterable[torch.nn.Module]) -> dict[str, Any]:
    """The options of Megatron's optimizer for Muon. Also marks the parameters that Muon updates.

    Raises:
        ConfigError: Muon's library is not installed.
    """
    check_muon(config)
    for _, parameter, part in named_parts(config, chunks):
        # Biases and the row of a gate are no matrices.
        is_matrix = parameter.ndim > 1 and parameter.shape[0] > 1
        parameter.uses_muon = is_matrix and config.uses_muon(part)  # type: ignore[attr-defined]  # for _is_left_to_adam
    fields = (
        "muon_momentum",
        "muon_nesterov",
        "muon_scale_mode",
        "muon_extra_scale_factor",
        "muon_coefficient_type",
        "muon_num_ns_steps",
        "muon_fp32_matmul_prec",
    )
    own = {name: getattr(config.optimizer, name) for name in fields}
    # Other modes orthogonalize each rank's shard, or sum in another order; both differ from the result on one rank.
    return {"optimizer": STACKED_MUON, "muon_tp_mode": "duplicated", **own}
