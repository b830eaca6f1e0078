"""The router on a GPU chooses the experts that it chooses on the CPU, given the same fp32 logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_most import platform
from tests.distributed.tiny import tiny_config
from tests.gpu.computations import ROUTERS, routing

EXACT = ("routing map", "order", "tokens", "routed")


@pytest.mark.parametrize("implementation", ["operators", "kernel"])
@pytest.mark.parametrize("name", ROUTERS)
def test_routing_dispatch_and_statistics_are_the_cpus(
    name: str, implementation: str, on_cpu: Callable[..., Any]
) -> None:
    is_kernel = implementation == "kernel"
    if is_kernel and (not platform.can_run_triton() or tiny_config(**ROUTERS[name]).model.moe.is_group_limited):
        pytest.skip("no Triton here, or group-limited routing, which the kernel does not have")
    found, wanted = routing(ROUTERS[name], is_kernel), on_cpu("routing")[name]
    assert wanted["routing map"].any()
    for key, tensor in wanted.items():
        if key in EXACT:
            assert torch.equal(found[key], tensor), key
        else:
            torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: key + text)
