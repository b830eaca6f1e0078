"""Counts of ATen operators, which on a GPU are kernels to launch: what a step costs the host."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_FREE = ("empty", "new_empty", "_unsafe_view", "_reshape_alias", "is_same_size")


class Operators(TorchDispatchMode):
    """``counts`` of the operators that ran inside, without views and allocations; those of the backward as well."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(_FREE):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))
