"""The router against independent implementations: Megatron's, Hugging Face's, and the published formula."""

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from megatron_most import parallel
from megatron_most.config import ExpertGroupConfig, MoEConfig
from tests.distributed.tiny import tiny_config
from tests.unit.moe.routing import HIDDEN, flat, make_router, make_tokens, megatron_config, route

EXPERTS, TOP_K = 16, 4


@pytest.fixture(scope="module", autouse=True)
def process_groups():
    parallel.initialize(tiny_config().parallel, seed=1)
    yield
    parallel.destroy()


@pytest.fixture(autouse=True)
def unit_loss_scale():
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))


def one_modality(moe_router_num_groups: int = 1, moe_router_group_topk: int = 1, **options) -> MoEConfig:
    group = ExpertGroupConfig(
        "text",
        EXPERTS,
        TOP_K,
        moe_router_num_groups=moe_router_num_groups,
        moe_router_group_topk=moe_router_group_topk,
    )
    options = {
        "moe_router_load_balancing_type": "none",
        "norm_topk_prob": options.get("moe_router_score_function") == "sigmoid",
        **options,
    }
    return MoEConfig(groups=[group], **options)


def all_text(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return make_tokens(seed, length=200, shares=(1.0,), padding=0)


def random_bias(router) -> torch.Tensor:
    return router.expert_bias.values.normal_(std=0.3, generator=torch.Generator().manual_seed(5))[0]


MEGATRON = {
    "softmax": ({}, {"moe_router_score_function": "softmax"}),
    "scaled": ({"moe_router_topk_scaling_factor": 2.5}, {"moe_router_topk_scaling_factor": 2.5}),
    "sigmoid": ({"moe_router_score_function": "sigmoid"}, {"moe_router_score_function": "sigmoid"}),
    "sigmoid-limited": (
        {"moe_router_score_function": "sigmoid", "moe_router_num_groups": 4, "moe_router_group_topk": 2},
        {"moe_router_score_function": "sigmoid", "moe_router_num_groups": 4, "moe_router_group_topk": 2},
    ),
    # Megatron ranks a run by its topk // topk_group best, which is one here, as it always is in ours with softmax.
    "softmax-limited": (
        {"moe_router_num_groups": 4, "moe_router_group_topk": 4},
        {"moe_router_num_groups": 4, "moe_router_group_topk": 4},
    ),
    "bias": (
        {
            "moe_router_score_function": "sigmoid",
            "moe_router_bias_update_rate": 1e-3,
            "moe_router_num_groups": 4,
            "moe_router_group_topk": 2,
        },
        {
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_num_groups": 4,
            "moe_router_group_topk": 2,
        },
    ),
    "aux-loss": (
        {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.5},
        {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.5},
    ),
    "seq-aux-loss": (
        {
            "moe_router_load_balancing_type": "seq_aux_loss",
            "moe_aux_loss_coeff": 0.5,
            "moe_router_score_function": "sigmoid",
        },
        {
            "moe_router_load_balancing_type": "seq_aux_loss",
            "moe_aux_loss_coeff": 0.5,
            "moe_router_score_function": "sigmoid",
        },
    ),
    "z-loss": ({"moe_z_loss_coeff": 0.5}, {"moe_z_loss_coeff": 0.5}),
}


@pytest.mark.parametrize("case", MEGATRON)
def test_one_modality_equals_megatrons_router(case):
    """The choice and its probabilities exactly; losses, which are summed in another order, by their gradient."""
    options, megatron_options = MEGATRON[case]
    router = make_router(one_modality(**options))
    config = megatron_config(EXPERTS)
    config.moe_router_topk, config.moe_z_loss_coeff = TOP_K, None
    for name, value in megatron_options.items():
        setattr(config, name, value)
    plain = TopKRouter(config, ProcessGroupCollection.use_mpu_process_groups())
    plain.set_layer_number(2)
    plain.weight.data.copy_(router.weight)
    if case == "bias":
        plain.expert_bias.copy_(random_bias(router))

    hidden, modality, is_padding = all_text()
    probs, routing_map = route(router, hidden, modality, is_padding)
    plain_probs, plain_map = plain(hidden)
    assert torch.equal(routing_map, plain_map)
    assert torch.equal(probs, plain_probs)
    if case == "bias":
        router.expert_bias.values.zero_()
        assert not torch.equal(route(router, hidden, modality, is_padding)[1], routing_map)

    upstream = torch.randn(probs.shape, generator=torch.Generator().manual_seed(1))
    for each, output in ((router, probs), (plain, plain_probs)):
        output.backward(upstream)
        assert each.weight.grad.any()
    torch.testing.assert_close(router.weight.grad, plain.weight.grad)


def test_score_rule_all_equals_the_published_definition():
    groups = [ExpertGroupConfig("text", 4, 2), ExpertGroupConfig("audio", 4, 2)]
    router = make_router(MoEConfig(groups=groups, score_rule="all"))
    hidden, modality, is_padding = make_tokens(padding=0)
    probs, routing_map = route(router, hidden, modality, is_padding)
    # Softmax over all experts, the other group's scores set to zero, top-k, not normalized again.
    scores = torch.softmax(hidden.reshape(-1, HIDDEN) @ router.weight.t(), dim=-1)
    is_own = (torch.arange(8) >= 4) == (flat(modality) == 1)[:, None]
    top, chosen = (scores * is_own).topk(2, dim=-1)
    expected = torch.zeros_like(scores).scatter(1, chosen, top)
    torch.testing.assert_close(probs, expected)
    assert torch.equal(routing_map, expected > 0)


def assert_same_choice(router, reference) -> None:
    hidden, modality, is_padding = all_text()
    probs, routing_map = route(router, hidden, modality, is_padding)
    _, weights, experts = reference(hidden.reshape(1, -1, HIDDEN))
    expected = torch.zeros_like(probs).scatter(1, experts, weights)
    assert torch.equal(routing_map, expected > 0)
    torch.testing.assert_close(probs, expected)


@pytest.mark.parametrize("topk_group", [1, 2, 3])
def test_limited_softmax_routing_equals_hugging_faces_deepseek_v2(topk_group):
    router = make_router(
        one_modality(moe_router_num_groups=4, moe_router_group_topk=topk_group, moe_router_topk_scaling_factor=1.5)
    )
    config = DeepseekV2Config(
        hidden_size=HIDDEN,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        n_group=4,
        topk_group=topk_group,
        topk_method="group_limited_greedy",
        routed_scaling_factor=1.5,
    )
    reference = DeepseekV2TopkRouter(config)
    reference.weight.data.copy_(router.weight)
    assert_same_choice(router, reference)


@pytest.mark.parametrize("normalize_top_k", [True, False])
@pytest.mark.parametrize("topk_group", [1, 2, 3])
def test_limited_sigmoid_routing_with_a_bias_equals_hugging_faces_deepseek_v3(topk_group, normalize_top_k):
    router = make_router(
        one_modality(
            moe_router_num_groups=4,
            moe_router_group_topk=topk_group,
            moe_router_score_function="sigmoid",
            norm_topk_prob=normalize_top_k,
            moe_router_topk_scaling_factor=2.5,
            moe_router_bias_update_rate=1e-3,
        )
    )
    config = DeepseekV3Config(
        hidden_size=HIDDEN,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        n_group=4,
        topk_group=topk_group,
        norm_topk_prob=normalize_top_k,
        routed_scaling_factor=2.5,
    )
    reference = DeepseekV3TopkRouter(config)
    reference.weight.data.copy_(router.weight)
    reference.e_score_correction_bias.copy_(random_bias(router))
    assert_same_choice(router, reference)
