"""The router alone, in one process: what it chooses, with which weight, and which gradients it sends."""

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter

from megatron_most import parallel
from megatron_most.model.transformer_config import transformer_config
from megatron_most.moe.router import ModalityAwareRouter
from megatron_most.moe.token_planes import pack_planes, unpack_planes
from megatron_most.vocab import Modality
from tests.distributed.tiny import tiny_config

ROWS, LENGTH = 2, 24


@pytest.fixture(scope="module", autouse=True)
def process_groups():
    parallel.initialize(tiny_config().parallel, seed=1)
    yield
    parallel.destroy()


@pytest.fixture(autouse=True)
def unit_loss_scale():
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))


def make_router(seed: int = 0, **overrides) -> ModalityAwareRouter:
    torch.manual_seed(seed)
    config = tiny_config(**overrides)
    pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    router = ModalityAwareRouter(transformer_config(config), pg_collection, moe=config.model.moe)
    torch.nn.init.normal_(router.weight)
    router.set_layer_number(2)
    return router


def make_tokens(seed: int = 0, audio_share: float = 0.4):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(LENGTH, ROWS, 32, generator=generator)
    modality = (torch.rand(ROWS, LENGTH, generator=generator) < audio_share).long()
    is_padding = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    is_padding[1, -4:] = True
    return hidden, modality, is_padding


def route(router, hidden, modality, is_padding):
    # The MoE layer hands the planes on transposed.
    return router(hidden, pack_planes(modality, is_padding).transpose(0, 1))


def flat(per_position: torch.Tensor) -> torch.Tensor:
    return per_position.transpose(0, 1).reshape(-1)


def test_planes_survive_packing():
    _, modality, is_padding = make_tokens()
    unpacked = unpack_planes(pack_planes(modality, is_padding).transpose(0, 1))
    assert torch.equal(unpacked[0].t(), modality) and torch.equal(unpacked[1].t(), is_padding)


@pytest.mark.parametrize("score_rule", ["group", "all"])
@pytest.mark.parametrize("order", ["interleaved", "contiguous"])
def test_tokens_stay_in_their_group_and_padding_goes_nowhere(score_rule, order):
    router = make_router(model__moe__score_rule=score_rule, model__moe__expert_order=order)
    hidden, modality, is_padding = make_tokens()
    probs, routing_map = route(router, hidden, modality, is_padding)
    allowed = router.allowed[flat(modality)]
    assert not (routing_map & ~allowed).any()
    assert torch.equal(routing_map.sum(dim=1), 2 * (~flat(is_padding)).long())
    assert torch.equal(probs > 0, routing_map)


def test_score_rule_all_equals_the_published_definition():
    router = make_router(model__moe__score_rule="all")
    hidden, modality, is_padding = make_tokens()
    is_padding[:] = False
    probs, routing_map = route(router, hidden, modality, is_padding)
    # Softmax over all experts, the other group's scores set to zero, top-k, not normalised again.
    scores = torch.softmax(hidden.reshape(-1, 32) @ router.weight.t(), dim=-1)
    scores = scores * router.allowed[flat(modality)]
    top, chosen = scores.topk(2, dim=-1)
    expected = torch.zeros_like(scores).scatter(1, chosen, top)
    torch.testing.assert_close(probs, expected)
    assert torch.equal(routing_map, expected > 0)


def test_score_rule_group_on_text_alone_equals_megatrons_router_over_the_text_experts():
    router = make_router()
    hidden, modality, is_padding = make_tokens(audio_share=0.0)
    is_padding[:] = False
    probs, routing_map = route(router, hidden, modality, is_padding)
    text = router.allowed[Modality.TEXT]

    config = transformer_config(tiny_config())
    config.num_moe_experts, config.moe_z_loss_coeff = 4, None
    plain = TopKRouter(config, ProcessGroupCollection.use_mpu_process_groups())
    plain.weight.data.copy_(router.weight[text])
    plain_probs, plain_map = plain(hidden)
    assert torch.equal(probs[:, text], plain_probs) and torch.equal(routing_map[:, text], plain_map)


def test_normalised_top_k_sums_to_the_scaling_factor():
    router = make_router(model__moe__normalize_top_k=True, model__moe__routed_scaling_factor=2.5)
    hidden, modality, is_padding = make_tokens()
    probs, _ = route(router, hidden, modality, is_padding)
    torch.testing.assert_close(probs.sum(dim=1), 2.5 * (~flat(is_padding)).float())


@pytest.mark.parametrize("balance", ["aux_loss", "seq_aux_loss", "none"])
def test_gradient_on_the_other_groups_router_rows_is_exactly_zero(balance):
    router = make_router(model__moe__balance_loss=balance)
    hidden, modality, is_padding = make_tokens(audio_share=0.0)
    probs, _ = route(router, hidden, modality, is_padding)
    probs.square().sum().backward()
    assert router.weight.grad[router.allowed[Modality.TEXT]].abs().min() > 0
    assert torch.count_nonzero(router.weight.grad[router.allowed[Modality.AUDIO]]) == 0


def balance_by_definition(router, hidden, modality, is_padding, routing_map) -> torch.Tensor:
    """T * E_g * sum_i f_i P_i of every (sequence, group), written out."""
    logits = (hidden.reshape(-1, 32) @ router.weight.t()).masked_fill(~router.allowed[flat(modality)], float("-inf"))
    probs = torch.softmax(logits, dim=-1)
    row = torch.arange(LENGTH * ROWS) % ROWS
    total = torch.zeros(())
    for sequence in range(ROWS):
        for group in Modality:
            tokens = (row == sequence) & (flat(modality) == group) & ~flat(is_padding)
            experts = router.allowed[group]
            fraction = routing_map[tokens][:, experts].float().sum(dim=0) / (2 * tokens.sum())
            mean_prob = probs[tokens][:, experts].mean(dim=0)
            total = total + tokens.sum() * experts.sum() * (fraction * mean_prob).sum()
    return total


def test_balance_loss_and_its_gradient_equal_the_definition_group_by_group():
    router = make_router(model__moe__z_loss_coeff=0)
    hidden, modality, is_padding = make_tokens()
    probs, routing_map = route(router, hidden, modality, is_padding)
    (probs * 0).sum().backward()  # only the attached loss has a gradient
    attached, router.weight.grad = router.weight.grad, None

    expected = balance_by_definition(router, hidden, modality, is_padding, routing_map)
    assert router.statistics.balance.item() == pytest.approx(expected.item(), rel=1e-6)
    (expected * router.moe.balance_coeff).backward()
    torch.testing.assert_close(attached, router.weight.grad)


def test_z_loss_gradient_equals_the_definition():
    router = make_router(model__moe__balance_loss="none", model__moe__z_loss_coeff=0.5)
    hidden, modality, is_padding = make_tokens()
    probs, _ = route(router, hidden, modality, is_padding)
    (probs * 0).sum().backward()
    attached, router.weight.grad = router.weight.grad, None

    logits = (hidden.reshape(-1, 32) @ router.weight.t()).masked_fill(~router.allowed[flat(modality)], float("-inf"))
    (0.5 * torch.logsumexp(logits, dim=-1)[~flat(is_padding)].square().sum()).backward()
    torch.testing.assert_close(attached, router.weight.grad)


def test_statistics_count_training_passes_only_and_in_logical_order():
    router = make_router()
    hidden, modality, is_padding = make_tokens()
    with torch.no_grad():
        route(router, hidden, modality, is_padding)
    assert router.statistics.tokens.sum() == 0
    _, routing_map = route(router, hidden, modality, is_padding)
    valid = ~flat(is_padding)
    for group in Modality:
        chosen = routing_map[(flat(modality) == group) & valid].sum(dim=0)
        assert torch.equal(router.statistics.routed[group], chosen.double())
        assert router.statistics.tokens[group] == ((flat(modality) == group) & valid).sum()


def test_a_router_without_modality_says_so():
    router = make_router()
    with pytest.raises(RuntimeError, match="layer 2: no modality reached the router"):
        router(make_tokens()[0], None)


def test_modality_of_another_shape_is_refused():
    router = make_router()
    hidden, modality, is_padding = make_tokens()
    with pytest.raises(RuntimeError, match="layer 2: modality of shape"):
        route(router, hidden, modality[:, :-1], is_padding[:, :-1])
