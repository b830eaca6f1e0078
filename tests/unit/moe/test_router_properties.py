"""Routing and its losses for random groups, options, mixes and expert orders, against a loop over tokens."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_most import parallel
from megatron_most.config import CommonExpertsConfig, ExpertGroupConfig, MoEConfig
from megatron_most.moe.router import ModalityAwareRouter
from tests.distributed.tiny import tiny_config
from tests.unit.moe.routing import (
    flat,
    make_router,
    make_tokens,
    reference_logits,
    reference_losses,
    reference_routing,
    route,
)

NAMES = ("text", "audio", "image")


@pytest.fixture(scope="module", autouse=True)
def process_groups():
    parallel.initialize(tiny_config().parallel, seed=1)
    yield
    parallel.destroy()


@dataclass
class Case:
    moe: MoEConfig
    expert_parallel_size: int
    tokens: dict
    bias: torch.Tensor | None


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


@st.composite
def layers(draw) -> MoEConfig:
    num_modalities = draw(st.integers(1, 3))
    num_common = draw(st.integers(0, 4))
    open_to = draw(st.lists(st.sampled_from(NAMES[:num_modalities]), unique=True)) if num_common else []
    sizes = []
    for name in NAMES[:num_modalities]:
        has_common = num_common > 0 and (not open_to or name in open_to)
        sizes.append(draw(st.integers(0 if has_common else 1, 6)))
    lists: list[list[int]] = [[] for _ in range(num_modalities + 1)]
    if draw(st.booleans()):
        numbers = draw(st.permutations(range(sum(sizes) + num_common)))
        cuts = itertools.accumulate([*sizes, num_common], initial=0)
        lists = [list(numbers[start:stop]) for start, stop in itertools.pairwise(cuts)]
    groups = []
    coefficient = st.sampled_from([None, 0.0, 0.7])
    for m, (name, size) in enumerate(zip(NAMES, sizes, strict=False)):
        choice = size + (num_common if not open_to or name in open_to else 0)
        n_group = draw(st.sampled_from(divisors(choice)))
        topk_group = draw(st.integers(1, n_group))
        groups.append(
            ExpertGroupConfig(
                name,
                size,
                moe_router_topk=draw(st.integers(1, choice // n_group * topk_group)),
                experts=lists[m],
                moe_router_num_groups=n_group,
                moe_router_group_topk=topk_group,
                moe_aux_loss_coeff=draw(coefficient),
                moe_z_loss_coeff=draw(coefficient),
            )
        )
    score_function = draw(st.sampled_from(["softmax", "sigmoid"]))
    return MoEConfig(
        groups=groups,
        common=CommonExpertsConfig(num_common, experts=lists[-1], modalities=open_to),
        moe_router_score_function=score_function,
        score_rule=draw(st.sampled_from(["group", "all"])) if score_function == "softmax" else "group",
        norm_topk_prob=draw(st.booleans()),
        moe_router_topk_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        router_weights=draw(st.sampled_from(["shared", "per_modality"])),
        expert_order=draw(st.sampled_from(["interleaved", "contiguous"])),
        moe_router_load_balancing_type=draw(st.sampled_from(["none", "aux_loss", "seq_aux_loss", "global_aux_loss"])),
        moe_aux_loss_coeff=0.3,
        moe_z_loss_coeff=draw(st.sampled_from([0.0, 0.2])),
        orthogonality_coeff=draw(st.sampled_from([0.0, 0.1])),
        moe_router_bias_update_rate=draw(st.sampled_from([0.0, 1e-3])),
    )


@st.composite
def cases(draw) -> Case:
    moe = draw(layers())
    num_modalities = len(moe.groups)
    length = draw(st.integers(1, 10))
    shares = draw(st.lists(st.integers(0, 3), min_size=num_modalities, max_size=num_modalities).filter(any))
    seed = draw(st.integers(0, 2**20))
    bias = None
    if moe.moe_router_bias_update_rate:
        bias = torch.randn(num_modalities, moe.num_experts, generator=torch.Generator().manual_seed(seed)) * 0.3
    return Case(
        moe,
        expert_parallel_size=draw(st.sampled_from(divisors(moe.num_experts))),
        tokens={
            "seed": seed,
            "rows": draw(st.integers(1, 3)),
            "length": length,
            "shares": tuple(map(float, shares)),
            "padding": draw(st.integers(0, length)),
        },
        bias=bias,
    )


def build(case: Case) -> ModalityAwareRouter:
    router = make_router(case.moe, case.expert_parallel_size, seed=case.tokens["seed"])
    if case.bias is not None:
        router.expert_bias.values.copy_(case.bias)
    return router


@settings(derandomize=True, max_examples=200)
@given(cases())
def test_every_valid_token_goes_to_its_top_k_of_its_own_choice(case):
    router = build(case)
    hidden, modality, is_padding = make_tokens(**case.tokens)
    probs, routing_map = route(router, hidden, modality, is_padding)
    tokens, is_valid = flat(modality), ~flat(is_padding)

    probs, routing_map = router.groups.to_logical(probs), router.groups.to_logical(routing_map)
    for m, choice in enumerate(router.groups.choices):
        outside = [expert for expert in range(case.moe.num_experts) if expert not in choice]
        assert not routing_map[tokens == m][:, outside].any()
    assert torch.equal(routing_map.sum(dim=1), torch.tensor(router.groups.top_k)[tokens] * is_valid)
    assert not probs[~routing_map].any()
    if case.moe.norm_topk_prob:
        torch.testing.assert_close(probs.sum(dim=1), case.moe.moe_router_topk_scaling_factor * is_valid.float())

    logits = router.groups.to_logical(router._own_logits(router.gating(hidden), tokens))
    torch.testing.assert_close(logits, reference_logits(case.moe, router.weight, hidden, tokens), rtol=1e-4, atol=1e-4)
    expected, expected_map, _ = reference_routing(case.moe, logits, tokens, is_valid, case.bias)
    assert torch.equal(routing_map, expected_map)
    torch.testing.assert_close(probs, expected)


@settings(derandomize=True, max_examples=200)
@given(cases())
def test_probabilities_and_losses_have_the_gradients_of_their_definitions(case):
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    router = build(case)
    hidden, modality, is_padding = make_tokens(**case.tokens)
    tokens, is_valid = flat(modality), ~flat(is_padding)
    probs, routing_map = route(router, hidden, modality, is_padding)
    upstream = torch.randn(probs.shape, generator=torch.Generator().manual_seed(1))
    (router.groups.to_logical(probs) * upstream).sum().backward()
    gradient, router.weight.grad = router.weight.grad, None

    logits = reference_logits(case.moe, router.weight, hidden, tokens)
    expected, expected_map, distribution = reference_routing(case.moe, logits, tokens, is_valid, case.bias)
    assert torch.equal(router.groups.to_logical(routing_map), expected_map)
    sums, total = reference_losses(
        case.moe, router.weight, logits, expected_map, distribution, tokens, is_valid, case.tokens["rows"]
    )
    ((expected * upstream).sum() + total).backward()
    torch.testing.assert_close(gradient, router.weight.grad, rtol=1e-3, atol=1e-4)

    moe = case.moe
    reported = {
        "balance_loss": moe.moe_router_load_balancing_type != "none",
        "z_loss": any(moe.moe_z_loss_coeff if g.moe_z_loss_coeff is None else g.moe_z_loss_coeff for g in moe.groups),
        "orthogonality_loss": moe.orthogonality_coeff > 0,
    }
    for name, is_reported in reported.items():
        value = sums[name].item() if is_reported else 0.0
        assert router.statistics.losses[name].item() == pytest.approx(value, rel=1e-4, abs=1e-4), name


@settings(derandomize=True, max_examples=100)
@given(cases())
def test_the_physical_order_changes_nothing(case):
    """Outputs and gradients: both orders at a random expert-parallel size, against a single rank."""
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    tokens = make_tokens(**case.tokens)
    results = []
    for order, size in (
        ("interleaved", 1),
        ("interleaved", case.expert_parallel_size),
        ("contiguous", case.expert_parallel_size),
    ):
        case.moe.expert_order, case.expert_parallel_size = order, size
        router = build(case)
        probs, routing_map = map(router.groups.to_logical, route(router, *tokens))
        (probs * torch.arange(probs.numel()).view_as(probs).cos()).sum().backward()
        results.append((probs, routing_map, router.weight.grad))
    first, *others = results
    for probs, routing_map, gradient in others:
        assert torch.equal(routing_map, first[1])
        torch.testing.assert_close(probs, first[0])
        torch.testing.assert_close(gradient, first[2], rtol=1e-4, atol=1e-5)
