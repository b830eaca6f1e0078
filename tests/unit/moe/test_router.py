"""The router alone, in one process: where tokens go, in which order rows are kept, and what is refused."""

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_most import parallel
from megatron_most.config import CommonExpertsConfig, ExpertGroupConfig, MoEConfig
from megatron_most.moe.token_planes import pack_planes, unpack_planes
from megatron_most.vocab import Modality
from tests.distributed.tiny import tiny_config
from tests.unit.moe.operators import Operators
from tests.unit.moe.routing import flat, make_router, make_tokens, route


@pytest.fixture(scope="module", autouse=True)
def process_groups():
    parallel.initialize(tiny_config().parallel, seed=1)
    yield
    parallel.destroy()


@pytest.fixture(autouse=True)
def unit_loss_scale():
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))


def text_and_audio(**options) -> MoEConfig:
    return MoEConfig(groups=[ExpertGroupConfig("text", 4, 2), ExpertGroupConfig("audio", 4, 2)], **options)


@pytest.mark.parametrize("num_modalities", [2, 3, 5])
def test_planes_survive_packing(num_modalities):
    _, modality, is_padding = make_tokens(shares=(1.0,) * num_modalities)
    assert modality.unique().numel() == num_modalities
    planes = pack_planes(modality, is_padding, num_modalities).transpose(0, 1)
    plane, membership = unpack_planes(planes, num_modalities)
    assert torch.equal(plane, flat(modality.masked_fill(is_padding, num_modalities)))
    expected = [(flat(modality) == m) & ~flat(is_padding) for m in range(num_modalities)]
    assert torch.equal(membership, torch.stack(expected).float())


def test_a_modality_with_a_smaller_top_k_is_sent_to_fewer_experts():
    router = make_router(MoEConfig(groups=[ExpertGroupConfig("text", 6, 4), ExpertGroupConfig("audio", 2, 1)]))
    hidden, modality, is_padding = make_tokens()
    probs, routing_map = route(router, hidden, modality, is_padding)
    expected = torch.tensor([4, 1])[flat(modality)] * ~flat(is_padding)
    assert torch.equal(routing_map.sum(dim=1), expected)
    assert torch.equal(probs > 0, routing_map)


def test_a_modality_without_experts_of_its_own_chooses_the_common_ones():
    groups = [ExpertGroupConfig("text", 4, 2), ExpertGroupConfig("audio", 0, 2)]
    router = make_router(MoEConfig(groups=groups, common=CommonExpertsConfig(3)))
    hidden, modality, is_padding = make_tokens()
    _, routing_map = route(router, hidden, modality, is_padding)
    chosen = routing_map[(flat(modality) == Modality.AUDIO) & ~flat(is_padding)]
    assert chosen[:, :4].sum() == 0 and (chosen[:, 4:].sum(dim=1) == 2).all()
    text = routing_map[(flat(modality) == Modality.TEXT) & ~flat(is_padding)]
    assert text[:, :4].any() and text[:, 4:].any()


def test_scores_that_underflow_still_choose_inside_the_group():
    """A gap of 200 makes all but one score of the group exactly 0, as scores outside it are."""
    router = make_router(text_and_audio())
    hidden, modality, is_padding = make_tokens(shares=(1.0, 0.0), padding=0)
    logits = torch.zeros(*hidden.shape[:2], 8)
    logits[..., 0] = 200.0
    planes = pack_planes(modality, is_padding, 2).transpose(0, 1)
    _, routing_map = router.routing(logits, planes)
    assert torch.equal(routing_map[:, :4].sum(dim=1), torch.full((48,), 2))
    assert not routing_map[:, 4:].any()


def test_own_router_weights_give_each_modality_its_own_logits():
    shared = make_router(text_and_audio())
    own = make_router(text_and_audio(router_weights="per_modality"))
    assert own.weight.shape == (2, 8, 32)
    hidden, modality, is_padding = make_tokens()
    for m in Modality:
        with torch.no_grad():
            shared.weight.copy_(own.weight[m])
        is_mine = flat(modality) == m
        expected, _ = route(shared, hidden, modality, is_padding)
        probs, _ = route(own, hidden, modality, is_padding)
        torch.testing.assert_close(probs[is_mine], expected[is_mine])
    probs.square().sum().backward()
    assert own.weight.grad.abs().sum(dim=(1, 2)).min() > 0


def test_initial_rows_are_logical_so_that_a_seed_gives_one_model_at_any_expert_parallel_size():
    torch.manual_seed(3)
    one = make_router(text_and_audio()).weight
    torch.manual_seed(3)
    four = make_router(text_and_audio(), expert_parallel_size=4).weight
    assert torch.equal(one, four)


def test_statistics_count_training_passes_only():
    router = make_router(text_and_audio())
    hidden, modality, is_padding = make_tokens()
    with torch.no_grad():
        route(router, hidden, modality, is_padding)
    router.eval()
    route(router, hidden, modality, is_padding)
    assert router.statistics.tokens.sum() == 0
    router.train()
    _, routing_map = route(router, hidden, modality, is_padding)
    for group in Modality:
        is_mine = (flat(modality) == group) & ~flat(is_padding)
        assert torch.equal(router.statistics.routed[group], routing_map[is_mine].sum(dim=0).double())
        assert router.statistics.tokens[group] == is_mine.sum()


def test_a_micro_batch_takes_few_operators():
    """Megatron's own router takes 50 with a balance loss by sequence, without statistics."""
    router = make_router(text_and_audio(moe_router_load_balancing_type="seq_aux_loss")).bfloat16()
    hidden, modality, is_padding = make_tokens(rows=1)
    hidden = hidden.bfloat16().requires_grad_()
    planes = pack_planes(modality, is_padding, 2).transpose(0, 1)
    router(hidden, planes)[0].sum().backward()
    with Operators() as operators:
        probs, _ = router(hidden, planes)
        probs.backward(torch.ones_like(probs))
    assert operators.counts.total() <= 46, operators.counts


def test_a_router_without_modality_says_so():
    router = make_router(text_and_audio())
    with pytest.raises(RuntimeError, match="layer 2: padding_mask is None"):
        router(make_tokens()[0], None)


def test_modality_of_another_shape_is_refused():
    router = make_router(text_and_audio())
    hidden, modality, is_padding = make_tokens()
    with pytest.raises(RuntimeError, match="layer 2: planes of shape"):
        route(router, hidden, modality[:, :-1], is_padding[:, :-1])
