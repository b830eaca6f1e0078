"""The expert bias: how it moves, what it touches, and that bf16 does not touch it."""

import pytest
import torch

from megatron_most import parallel
from megatron_most.config import CommonExpertsConfig, ExpertGroupConfig, MoEConfig
from megatron_most.moe.router import end_routing_step
from tests.distributed.tiny import tiny_config
from tests.unit.moe.routing import flat, make_router, make_tokens, route

RATE = 1e-3


@pytest.fixture(scope="module", autouse=True)
def process_groups():
    parallel.initialize(tiny_config().parallel, seed=1)
    yield
    parallel.destroy()


def biased(**options) -> MoEConfig:
    groups = [ExpertGroupConfig("text", 5, 3), ExpertGroupConfig("audio", 3, 2)]
    options = {"moe_router_score_function": "sigmoid", "moe_router_bias_update_rate": RATE, **options}
    return MoEConfig(groups=groups, common=CommonExpertsConfig(2), **options)


@pytest.mark.parametrize("expert_parallel_size", [1, 5])
def test_the_bias_moves_toward_the_mean_load_of_the_modalitys_choice(expert_parallel_size):
    router = make_router(biased(), expert_parallel_size)
    counts = torch.zeros(2, 10)
    for seed in (1, 2):
        tokens = make_tokens(seed)
        _, routing_map = route(router, *tokens)
        for m in (0, 1):
            mine = (flat(tokens[1]) == m) & ~flat(tokens[2])
            counts[m] += router.groups.to_logical(routing_map[mine]).sum(dim=0)
    end_routing_step([router])
    expected = torch.zeros(2, 10)
    for m, choice in enumerate(router.groups.choices):
        load = counts[m, list(choice)]
        expected[m, list(choice)] = RATE * torch.sign(load.mean() - load)
    assert expected.unique().numel() >= 3
    torch.testing.assert_close(router.expert_bias.values, expected, rtol=0, atol=0)
    end_routing_step([router])  # a step without tokens
    assert torch.equal(router.expert_bias.values, expected)


def test_a_frozen_router_keeps_its_bias():
    frozen, learning = make_router(biased()), make_router(biased())
    frozen.weight.requires_grad_(False)
    for router in (frozen, learning):
        route(router, *make_tokens())
    end_routing_step([frozen, learning])
    assert not frozen.expert_bias.values.any() and learning.expert_bias.values.any()


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_repeated_steps_even_out_the_load(score_function):
    router = make_router(
        biased(
            moe_router_score_function=score_function,
            moe_router_bias_update_rate=5e-3,
            moe_router_load_balancing_type="none",
        )
    )
    with torch.no_grad():
        router.weight.mul_(0.2)
    hidden, modality, is_padding = make_tokens(rows=4, length=256)
    hidden += 0.5 * torch.randn(
        hidden.shape[-1], generator=torch.Generator().manual_seed(1)
    )  # tokens prefer some experts

    def busiest_over_mean() -> float:
        loads = [pairs[list(choice)] for pairs, choice in zip(bias.step_pairs, router.groups.choices, strict=True)]
        return max(float(load.max() / load.mean()) for load in loads)

    bias = router.expert_bias
    route(router, hidden, modality, is_padding)
    before = busiest_over_mean()
    for _ in range(80):
        end_routing_step([router])
        route(router, hidden, modality, is_padding)
    assert before > 1.5 and busiest_over_mean() < 1.1


def test_the_bias_changes_the_choice_and_not_the_weight_of_an_expert():
    router = make_router(biased())
    hidden, modality, is_padding = make_tokens(shares=(1.0, 0.0), padding=0)
    before, _ = route(router, hidden, modality, is_padding)
    router.expert_bias.values[0, 3] = 5.0
    router.expert_bias.values[1, :] = -5.0  # the other modality's, on experts they share too
    after, routing_map = route(router, hidden, modality, is_padding)
    assert routing_map[:, 3].all() and not (before[:, 3] > 0).all()
    both = (before > 0) & (after > 0)
    assert torch.equal(before[both], after[both])


def test_counts_are_of_training_passes_only():
    router = make_router(biased())
    with torch.no_grad():
        route(router, *make_tokens())
    route(router.eval(), *make_tokens())
    assert not router.expert_bias.step_pairs.any()


def test_a_bf16_model_keeps_its_bias_in_fp32():
    router = make_router(biased())
    router.expert_bias.values.copy_(torch.linspace(0.9, 1.1, 20).view(2, 10))
    expected = router.expert_bias.values.clone()
    half = router.bfloat16()
    assert half.weight.dtype == torch.bfloat16
    assert torch.equal(half.expert_bias.values, expected)
    assert dict(half.named_buffers())["expert_bias.values"] is half.expert_bias.values
    state = half.sharded_state_dict(prefix="router.")
    assert torch.equal(state["router.expert_bias.values"].data, expected)
    assert state["router.expert_bias.values"].key == "router.expert_bias.values"
