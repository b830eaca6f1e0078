"""The expert backends of one rank: grouped products against one expert after another, and what they refuse."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.process_groups_config import ProcessGroupCollection
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megatron_most import parallel
from megatron_most.config import RunConfig
from megatron_most.model.specs import experts_spec
from megatron_most.model.transformer_config import transformer_config
from megatron_most.moe import ExpertGroups
from megatron_most.moe import experts as experts_module
from tests.distributed.shards import fill_weights, local_pieces
from tests.distributed.tiny import tiny_config

HIDDEN = 32
POOLS = {
    "model__moe__groups": "[{modality: text, size: 3, moe_router_topk: 2},"
    " {modality: audio, size: 2, moe_router_topk: 1}]"
}
COMMON = {"model__moe__common__size": 3}


@pytest.fixture(scope="module", autouse=True)
def process_groups():
    parallel.initialize(tiny_config().parallel, seed=1)
    yield
    parallel.destroy()


def make_experts(config: RunConfig) -> torch.nn.Module:
    groups = ProcessGroupCollection.use_mpu_process_groups()
    moe = config.model.moe
    spec = experts_spec(moe, ExpertGroups.from_config(moe))
    return spec(moe.num_experts, transformer_config(config), pg_collection=groups)


def filled(config: RunConfig) -> torch.nn.Module:
    experts = make_experts(config)
    fill_weights([experts])
    return experts


def run(experts: torch.nn.Module, counts: list[int], dtype: torch.dtype = torch.float32, recompute: bool = False):
    """Output, gradients of tokens and probs, and gradients of the weights by global name and place."""
    generator = torch.Generator().manual_seed(sum(counts))
    tokens = torch.randn(sum(counts), HIDDEN, generator=generator).to(dtype).requires_grad_()
    probs = torch.rand(sum(counts), generator=generator).requires_grad_()
    output_gradient = torch.randn(sum(counts), HIDDEN, generator=generator).to(dtype)
    experts.zero_grad(set_to_none=True)
    arguments = (tokens, torch.tensor(counts), probs)
    output, bias = checkpoint(experts, *arguments, use_reentrant=True) if recompute else experts(*arguments)
    assert bias is None
    output.backward(output_gradient)
    for parameter in experts.parameters():
        assert parameter.grad is not None, "missing, not zero"
        parameter.data = parameter.grad
    weights = {(key, offset): piece.clone() for key, _, offset, piece in local_pieces([experts])}
    return output.detach(), tokens.grad, probs.grad, weights


def assert_equal_runs(mine, theirs, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    *mine, my_weights = mine
    *theirs, their_weights = theirs
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)
    assert my_weights.keys() == their_weights.keys()
    for key, gradient in my_weights.items():
        torch.testing.assert_close(gradient, their_weights[key], rtol=rtol, atol=atol)


@settings(max_examples=20)
@given(st.lists(st.sampled_from([0, 0, 1, 2, 7, 30]), min_size=8, max_size=8), st.booleans(), st.booleans())
def test_grouped_equals_sequential_for_any_load(counts: list[int], recompute: bool, contiguous: bool) -> None:
    overrides = {**POOLS, **COMMON, "model__moe__expert_order": "contiguous" if contiguous else "interleaved"}
    mine, theirs = (
        run(filled(tiny_config(**overrides, model__moe__expert_backend=backend)), counts, recompute=recompute)
        for backend in ("grouped", "sequential")
    )
    assert_equal_runs(mine, theirs)


def test_grouped_equals_sequential_in_bf16() -> None:
    counts = [5, 0, 11, 2, 30]
    mine, theirs = (
        run(
            filled(tiny_config(**POOLS, precision__dtype="bf16", model__moe__expert_backend=backend)),
            counts,
            torch.bfloat16,
        )
        for backend in ("grouped", "sequential")
    )
    assert mine[0].dtype == torch.bfloat16 and mine[2].dtype == torch.float32
    assert_equal_runs(mine, theirs, rtol=0.05, atol=0.02)


class CountOperators(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.counts[str(function)] += 1
        return function(*arguments, **(keywords or {}))


def test_a_recomputed_activation_repeats_no_product() -> None:
    counts, runs = {}, {}
    for mode in ("none", "moe_act"):
        with CountOperators() as counted:
            runs[mode] = run(filled(tiny_config(**POOLS, training__recompute=mode)), [5, 0, 11, 2, 30])
        counts[mode] = counted.counts
    assert_equal_runs(runs["moe_act"], runs["none"], rtol=0, atol=0)
    products, activation = "aten._grouped_mm.default", "aten.silu.default"
    assert counts["moe_act"][products] == counts["none"][products] == 12
    assert (counts["none"][activation], counts["moe_act"][activation]) == (2, 4)


@pytest.mark.parametrize("sizes", [(2, 3), (0, 0)])
def test_a_gradient_that_is_not_dense_is_taken(sizes: tuple[int, int]) -> None:
    """A sum's gradient repeats one number; with a single pool nothing stands between it and the matrix product."""
    groups = ", ".join(
        f"{{modality: {name}, size: {size}, moe_router_topk: 2}}"
        for name, size in zip(("text", "audio"), sizes, strict=True)
    )
    common = 5 - sum(sizes)
    experts = filled(tiny_config(model__moe__groups=f"[{groups}]", model__moe__common__size=common))
    assert len(list(experts.children())) == (1 if common else 2)
    tokens = torch.randn(6, HIDDEN, requires_grad=True)
    output, _ = experts(tokens, torch.tensor([1, 2, 0, 2, 1]), torch.ones(6))
    output.sum().backward()
    assert tokens.grad.any()


def test_no_token_at_all_gives_zero_gradients() -> None:
    output, token_gradient, _, weights = run(filled(tiny_config()), [0] * 8)
    assert output.shape == token_gradient.shape == (0, HIDDEN)
    assert len(weights) == 8 * 3 and not any(gradient.any() for gradient in weights.values())


def test_the_activation_is_compiled_once_for_any_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = CompileCounter()
    compiled = torch.compile(experts_module._weighted_swiglu, backend=compiler)
    monkeypatch.setattr(experts_module, "_compiled_swiglu", compiled)
    experts = filled(tiny_config(**POOLS))
    with torch.compiler.set_stance("default"):
        for counts in ([5, 0, 11, 2, 30], [0, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0] * 5, [7, 8, 9, 1, 2], [0, 0, 0, 64, 0]):
            run(experts, counts)
    assert compiler.frame_count == 1


def test_pools_are_parameters_of_their_own() -> None:
    experts = make_experts(tiny_config(**POOLS, **COMMON))
    shapes = {name: tuple(parameter.shape) for name, parameter in experts.named_parameters()}
    assert shapes == {
        f"{pool}_experts.{name}": (count, *shape)
        for pool, count in (("text", 3), ("audio", 2), ("common", 3))
        for name, shape in (("linear_fc1", (48, HIDDEN)), ("linear_fc2", (HIDDEN, 24)))
    }


def test_a_frozen_pool_takes_no_gradient_and_passes_it_on() -> None:
    experts = filled(tiny_config(**POOLS))
    experts.text_experts.requires_grad_(False)
    tokens = torch.randn(10, HIDDEN, requires_grad=True)
    output, _ = experts(tokens, torch.tensor([2] * 5), torch.ones(10))
    output.backward(torch.randn(10, HIDDEN))
    assert all(parameter.grad is None for parameter in experts.text_experts.parameters())
    assert all(parameter.grad.any() for parameter in experts.audio_experts.parameters())
    assert tokens.grad[:6].any() and tokens.grad[6:].any()


@pytest.mark.parametrize("backend", ["grouped", "sequential"])
def test_initial_weights_have_the_configured_spread(backend: str) -> None:
    config = tiny_config(model__moe__expert_backend=backend, model__init_method_std=0.3)
    weights: dict[str, list[torch.Tensor]] = {"linear_fc1": [], "linear_fc2": []}
    for key, _, _, piece in local_pieces([make_experts(config)]):
        weights[key.split(".")[1]].append(piece.flatten())
    # Megatron divides the spread of output projections by the root of twice the number of layers.
    for name, std in (("linear_fc1", 0.3), ("linear_fc2", 0.3 / 8**0.5)):
        values = torch.cat(weights[name])
        assert values.std().item() == pytest.approx(std, rel=0.05)
        assert abs(values.mean().item()) < 0.05 * std
