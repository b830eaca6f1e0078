"""Counts the ATen operators of a computation, how often the host waits for the device, bytes and FLOPs.

Operators exclude views and bare allocations. The host waits for results whose size depends on values, for single values
that it reads, and for copies of Python lists. On a CPU, waits are identified by the operator alone, so values that are
on the host anyway count too. Bytes are those of all operands and results, without caching. FLOPs are those of matrix
products and attention.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
WAITS = {"nonzero", "masked_select", "item", "_local_scalar_dense", "is_nonzero", "equal", "_unique2"}
LIST_COPY = "copy of a list"


@dataclasses.dataclass
class Count:
    """Operators and waits by name, bytes and FLOPs."""

    operators: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    waits: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    bytes: int = 0
    flops: int = 0

    @property
    def num_operators(self) -> int:
        return self.operators.total()

    @property
    def num_waits(self) -> int:
        return self.waits.total()

    def __sub__(self, other: Count) -> Count:
        return Count(
            self.operators - other.operators,
            self.waits - other.waits,
            self.bytes - other.bytes,
            self.flops - other.flops,
        )


class Counting(TorchDispatchMode):
    """``with Counting() as count`` counts the block, including backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Count()
        self._lists = _list_copies(self.count)

    def __enter__(self) -> Count:
        super().__enter__()
        self._lists.__enter__()
        return self.count

    def __exit__(self, *exception: Any) -> None:
        self._lists.__exit__(*exception)
        super().__exit__(*exception)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and name not in ALLOCATIONS and not _is_view(func):
            self.count.operators[name] += 1
            tensors = {id(x): x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}
            self.count.bytes += sum(tensor.nbytes for tensor in tensors.values())
            self.count.flops += _flops(func, args, kwargs or {}, out)
            if name in WAITS or _crosses_pageable(name, args, kwargs or {}, out):
                self.count.waits[name] += 1
        return out


@contextlib.contextmanager
def _list_copies(count: Count) -> Iterator[None]:
    """Counts copies of Python lists to a device: directly, or later without ``non_blocking``."""
    tensor, new_tensor, to = torch.tensor, torch.Tensor.new_tensor, torch.Tensor.to
    on_host = WeakTensorKeyDictionary()

    def counted_tensor(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = tensor(*args, **kwargs)
        if "device" in kwargs:
            count.waits[LIST_COPY] += 1
        else:
            on_host[made] = True
        return made

    def counted_new_tensor(*args: Any, **kwargs: Any) -> torch.Tensor:
        count.waits[LIST_COPY] += 1
        return new_tensor(*args, **kwargs)

    def counted_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self in on_host and not kwargs.get("non_blocking", False):
            count.waits[LIST_COPY] += 1
        return to(self, *args, **kwargs)

    with (
        mock.patch.object(torch, "tensor", counted_tensor),
        mock.patch.object(torch.Tensor, "new_tensor", counted_new_tensor),
        mock.patch.object(torch.Tensor, "to", counted_to),
    ):
        yield


def _is_view(func: Any) -> bool:
    aliases = [result.alias_info for result in func._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def _crosses_pageable(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> bool:
    """Whether a copy between host and device makes the host wait."""
    if name not in ("_to_copy", "copy_"):
        return False
    source, target = (args[0], out) if name == "_to_copy" else (args[1], args[0])
    if source.device.type == target.device.type:
        return False
    non_blocking = kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2])
    on_host = source if source.device.type == "cpu" else target
    return not (non_blocking and on_host.is_pinned())


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    aten, packet = torch.ops.aten, func.overloadpacket
    if packet is aten._grouped_mm:  # each row of the first operand is multiplied by one matrix
        return 2 * args[0].numel() * args[1].shape[-1]
    like = {
        aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: aten._scaled_dot_product_flash_attention_backward,
    }
    formula = flop_registry.get(like.get(packet, packet))
    return 0 if formula is None else formula(*args, **kwargs, out_val=out)
