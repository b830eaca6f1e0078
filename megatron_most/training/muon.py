"""Muon (arXiv 2502.16982) for every matrix, the experts of a pool among them, which are one parameter of many.

Megatron's Muon takes parameters of two axes and leaves the others to AdamW, and with them nine tenths of a mixture of
experts. Here each matrix of a stack is made orthogonal by itself: a pool's experts move as they would one by one.

Shape letters: e matrices of a stack; out, in their rows and columns (this rank's part of one of them).
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
"""The name of :class:`StackedMuon` among Megatron's optimizers."""


class StackedMuon(TensorParallelMuon):
    """Megatron's Muon, for stacks of matrices too. Split matrices are gathered and made orthogonal as wholes."""

    def orthogonalize(self, p: torch.Tensor, grad: torch.Tensor, **group: Any) -> torch.Tensor:
        """The update of ``p`` from its momentum ``grad``, ``[out, in]`` or ``[e, out, in]``, in the same shape."""
        if grad.ndim == 2:
            return super().orthogonalize(p, grad, **group)
        tensor_group = self.pg_collection.expt_tp if getattr(p, "expert_tp", False) else self.pg_collection.tp
        axis = getattr(p, "partition_dim", -1)
        # Counted from the end, an axis is the same of a stack and of one of its matrices.
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
    """Raise :class:`ConfigError` when the optimizer needs a library that is not there. Allocates nothing."""
    if config.optimizer.optimizer == "muon":
        platform.require_library("emerging_optimizers", "optimizer.optimizer", "muon")


def muon_options(config: RunConfig, chunks: Iterable[torch.nn.Module]) -> dict[str, Any]:
    """What Megatron's optimizer has to be told of Muon, after marking the weights that it moves.

    Raises:
        ConfigError: the library that computes it is missing.
    """
    check_muon(config)
    for _, parameter, part in named_parts(config, chunks):
        parameter.uses_muon = config.uses_muon(part)
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
    # The other modes make each rank's piece orthogonal, or sum in another order: neither is what one rank computes.
    return {"optimizer": STACKED_MUON, "muon_tp_mode": "duplicated", **own}
