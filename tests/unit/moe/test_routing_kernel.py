"""The Triton kernel of the router, run by Triton's interpreter: it is the router of torch's operators."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_most import parallel
from megatron_most.config import CommonExpertsConfig, ExpertGroupConfig, MoEConfig
from megatron_most.moe import routing_kernel
from megatron_most.moe.token_planes import pack_planes
from tests.distributed.tiny import tiny_config
from tests.unit.moe.operators import Operators
from tests.unit.moe.routing import make_router, make_tokens, route

pytest.importorskip("triton")

LOSSES = {"moe_aux_loss_coeff": 0.1, "moe_z_loss_coeff": 0.05, "orthogonality_coeff": 0.02}
UNEQUAL = [ExpertGroupConfig("text", 5, 3), ExpertGroupConfig("audio", 2, 1)]
OVERLAPPING = {
    "groups": [ExpertGroupConfig("text", 4, 2), ExpertGroupConfig("audio", 0, 3), ExpertGroupConfig("image", 3, 1)],
    "common": CommonExpertsConfig(4, modalities=["text", "audio"]),
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "group": {"groups": UNEQUAL},
    "all": {"groups": UNEQUAL, "score_rule": "all"},
    "group, one router each": {"groups": UNEQUAL, "router_weights": "per_modality", "norm_topk_prob": True},
    "all, renormalized": {"groups": UNEQUAL, "score_rule": "all", "norm_topk_prob": True},
    "sigmoid": {
        "groups": UNEQUAL,
        "moe_router_score_function": "sigmoid",
        "norm_topk_prob": True,
        "moe_router_topk_scaling_factor": 2.5,
    },
    "sigmoid, biased": {
        "groups": UNEQUAL,
        "moe_router_score_function": "sigmoid",
        "moe_router_bias_update_rate": 1e-3,
    },
    "common experts": OVERLAPPING,
    "common experts, all, biased": {**OVERLAPPING, "score_rule": "all", "moe_router_bias_update_rate": 1e-3},
    "balanced over all": {"groups": UNEQUAL, "moe_router_load_balancing_type": "aux_loss"},
}
TOKENS: dict[str, dict[str, Any]] = {
    "both modalities, padding": {},
    "text alone": {"shares": (1.0, 0.0)},
    "audio alone, one row": {"shares": (0.0, 1.0), "rows": 1},
    "padding alone": {"rows": 1, "padding": 24},
}


@pytest.fixture(scope="module", autouse=True)
def process_groups():
    parallel.initialize(tiny_config().parallel, seed=1)
    yield
    parallel.destroy()


@pytest.fixture(autouse=True)
def unit_loss_scale():
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))


def results(options: dict[str, Any], tokens: dict[str, Any], is_kernel: bool) -> dict[str, torch.Tensor]:
    """What a router gives and keeps of a micro-batch, and the gradients of its input and weight."""
    moe = MoEConfig(**{**LOSSES, **options})
    router = make_router(moe, expert_parallel_size=1)
    router.use_kernel(is_kernel)
    if router.expert_bias is not None:
        values = torch.randn(router.expert_bias.values.shape, generator=torch.Generator().manual_seed(3))
        router.expert_bias.values.copy_(values * router.expert_bias._is_allowed)
    num_modalities = len(moe.groups)
    shares = tokens.get("shares", (0.5, 0.5)) + (0.3,) * (num_modalities - 2)
    hidden, modality, is_padding = make_tokens(**{**tokens, "shares": shares})
    hidden.requires_grad_()
    probs, routing_map = route(router, hidden, modality, is_padding)
    weights = torch.randn(probs.shape, generator=torch.Generator().manual_seed(4))
    (probs * weights).sum().backward()
    return {
        "probs": probs.detach(),
        "routing_map": routing_map,
        "statistics": router.statistics.sums,
        "hidden": hidden.grad,
        "weight": router.weight.grad,
        **({} if router.expert_bias is None else {"load": router.expert_bias.step_pairs}),
    }


def assert_equal(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    assert torch.equal(found["routing_map"], expected["routing_map"])
    assert torch.equal(found["probs"] > 0, expected["probs"] > 0)
    for name, tensor in expected.items():
        unit = tensor.double().abs().max().clamp(min=1e-3).item()
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=2e-6 * unit, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_it_is_the_router_of_operators(name: str, tokens: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probabilities, routing, statistics, losses and gradients; several programs share each row."""
    monkeypatch.setattr("megatron_most.moe.routing_kernel._ELEMENTS", 128)
    expected, found = (results(CONFIGURATIONS[name], TOKENS[tokens], is_kernel) for is_kernel in (False, True))
    has_tokens = tokens != "padding alone"
    assert expected["routing_map"].any() == has_tokens and expected["statistics"].any() == has_tokens
    assert_equal(expected, found)


class NoKernel:
    """Launches nothing: Triton's interpreter calls operators of torch."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **options: None


def test_few_operators_surround_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch each way, and what losses and statistics do with sums; 38 with operators, which count as the kernels."""
    for name in ("_forward_kernel", "_backward_kernel"):
        monkeypatch.setattr(routing_kernel, name, NoKernel())
    groups = [ExpertGroupConfig("text", 4, 2), ExpertGroupConfig("audio", 4, 2)]
    router = make_router(MoEConfig(groups=groups, moe_router_load_balancing_type="seq_aux_loss")).bfloat16()
    router.use_kernel(True)
    hidden, modality, is_padding = make_tokens(rows=1)
    hidden = hidden.bfloat16().requires_grad_()
    planes = pack_planes(modality, is_padding, 2).transpose(0, 1)
    router(hidden, planes)[0].sum().backward()
    with Operators() as operators:
        probs, _ = router(hidden, planes)
        probs.backward(torch.ones_like(probs))
    assert operators.counts.total() + 2 <= 33, operators.counts


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler for GPUs is for Linux")
def test_the_kernels_compile_for_a_gpu_and_stay_in_registers(tmp_path: Path) -> None:
    """For compute capability 9.0, on any machine; Triton's interpreter accepts what its compiler does not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.moe.compile_routing_kernel"],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.count("REG") == 8, done.stderr
