"""The router on a GPU chooses the experts that it chooses on the CPU, given the same fp32 logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.gpu.computations import ROUTERS, routing

EXACT = ("routing map", "order", "tokens", "routed")


@pytest.mark.parametrize("name", ROUTERS)
def test_routing_dispatch_and_statistics_are_the_cpus(name: str, on_cpu: Callable[..., Any]) -> None:
    found, wanted = routing(ROUTERS[name]), on_cpu("routing")[name]
    assert wanted["routing map"].any()
    for key, tensor in wanted.items():
        if key in EXACT:
            assert torch.equal(found[key], tensor), key
        else:
            torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: key + text)
