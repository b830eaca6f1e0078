"""Losses of the router: none reaches another modality's rows, and none sees padding or evaluation."""

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_most import parallel
from megatron_most.config import CommonExpertsConfig, ExpertGroupConfig, MoEConfig
from megatron_most.moe.balance import BalanceLoss
from megatron_most.moe.expert_groups import ExpertGroups
from megatron_most.moe.router import end_routing_step
from tests.distributed.tiny import tiny_config
from tests.unit.moe.routing import HIDDEN, flat, make_router, make_tokens, reference_logits, reference_routing, route

LOSSES = {
    "aux_loss": {"moe_router_load_balancing_type": "aux_loss"},
    "seq_aux_loss": {"moe_router_load_balancing_type": "seq_aux_loss"},
    "global_aux_loss": {"moe_router_load_balancing_type": "global_aux_loss"},
    "z_loss": {"moe_z_loss_coeff": 0.1},
    "orthogonality_loss": {"orthogonality_coeff": 0.1},
}


@pytest.fixture(scope="module", autouse=True)
def process_groups():
    parallel.initialize(tiny_config().parallel, seed=1)
    yield
    parallel.destroy()


@pytest.fixture(autouse=True)
def unit_loss_scale():
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))


def text_and_audio(**options) -> MoEConfig:
    options = {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.1, **options}
    groups = [ExpertGroupConfig("text", 5, 3), ExpertGroupConfig("audio", 3, 2)]
    return MoEConfig(groups=groups, common=CommonExpertsConfig(2), **options)


def attached_gradient(router, tokens) -> torch.Tensor:
    """Of the losses alone."""
    router.weight.grad = None
    probs, _ = route(router, *tokens)
    (probs * 0).sum().backward()
    return router.weight.grad


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_on_the_other_groups_router_rows_is_exactly_zero(loss, score_function):
    router = make_router(text_and_audio(**LOSSES[loss], moe_router_score_function=score_function))
    text_only = make_tokens(shares=(1.0, 0.0))
    gradient = attached_gradient(router, text_only)
    assert gradient[:5].abs().amax(dim=1).min() > 0 and gradient[8:].abs().amax(dim=1).min() > 0
    assert torch.count_nonzero(gradient[5:8]) == 0
    probs, _ = route(router, *text_only)
    probs.square().sum().backward()
    assert torch.count_nonzero(router.weight.grad[5:8]) == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_padding_has_no_part_in_a_loss(loss):
    hidden, modality, is_padding = make_tokens(padding=6)
    router = make_router(text_and_audio(**LOSSES[loss]))
    gradient = attached_gradient(router, (hidden, modality, is_padding))
    end_routing_step([router])
    hidden, modality = hidden.clone(), modality.clone()
    hidden[-6:, -1] = 7.0
    modality[-1, -6:] = 1 - modality[-1, -6:]
    torch.testing.assert_close(attached_gradient(router, (hidden, modality, is_padding)), gradient)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_coefficient_weighs_its_loss(loss):
    name = {"z_loss": "moe_z_loss_coeff", "orthogonality_loss": "orthogonality_coeff"}.get(loss, "moe_aux_loss_coeff")
    gradients = []
    for coefficient in (1.0, 3.0):
        router = make_router(text_and_audio(**{**LOSSES[loss], name: coefficient}))
        gradients.append(attached_gradient(router, make_tokens()))
    # A z-loss's gradients go into the hundreds, and cancel in some places to thousandths of that.
    largest = gradients[1].abs().max().item()
    torch.testing.assert_close(gradients[1], 3 * gradients[0], rtol=1.3e-6, atol=max(1e-5, 1e-6 * largest))


def test_global_aux_loss_looks_at_the_micro_batches_of_the_step_so_far():
    """The second of two equals the loss whose shares are counted over both; the next step begins anew."""
    router = make_router(text_and_audio(moe_router_load_balancing_type="global_aux_loss"))
    first, second = make_tokens(seed=1, padding=0), make_tokens(seed=2, padding=0)
    attached_gradient(router, first)
    gradient = attached_gradient(router, second)
    joined = tuple(torch.cat(pair, dim=d) for d, pair in zip((1, 0, 0), zip(first, second, strict=True), strict=True))

    with torch.no_grad():
        _, whole_map = route(router, *joined)
    router.weight.grad = None
    tokens, modality = second[0].reshape(-1, HIDDEN), second[1].t().reshape(-1)
    everyone = joined[1].t().reshape(-1)
    total = torch.zeros(())
    for m, choice in enumerate(router.groups.choices):
        probs = torch.softmax(tokens[modality == m] @ router.weight[list(choice)].t(), dim=1)
        counts = whole_map[everyone == m][:, list(choice)].float().sum(dim=0)
        total = total + 0.1 * len(choice) * (probs.sum(dim=0) * counts / counts.sum()).sum()
    total.backward()
    torch.testing.assert_close(gradient, router.weight.grad)

    alone = attached_gradient(make_router(router.moe), second)
    assert not torch.allclose(gradient, alone)
    end_routing_step([router])
    torch.testing.assert_close(attached_gradient(router, second), alone)


class Ranks:
    """What a loss asks of a process group."""

    def __init__(self, size: int) -> None:
        self.size = lambda: size


@pytest.mark.parametrize("is_alone", [False, True])
@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "global_aux_loss"])
def test_the_pairs_of_the_ranks_that_hold_the_other_tokens_count(kind, is_alone, monkeypatch):
    """Those with other positions of the same rows; for ``global_aux_loss``, those with other rows, too."""
    groups = ExpertGroups.from_config(text_and_audio())
    row_group, step_group = Ranks(1 if is_alone else 2), Ranks(1 if is_alone else 2)
    balance = BalanceLoss(kind, False, groups, torch.device("cpu"), row_group, step_group)
    random, num_sequences = torch.Generator().manual_seed(0), 3 if kind == "seq_aux_loss" else 1
    probs = torch.rand(num_sequences, 2, 10, generator=random) * groups.allowed()
    mine, others = torch.randint(0, 9, (2, 2, num_sequences, 10), generator=random).float() * groups.allowed()[:, None]
    mine, others = mine.transpose(0, 1), others.transpose(0, 1)  # laid out as a router's sums are
    used = []

    def all_reduce(pairs: torch.Tensor, group: Ranks) -> None:
        assert pairs.is_contiguous()
        used.append(group)
        pairs += others

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    before = mine.clone()
    found = balance(probs, mine)
    assert torch.equal(mine, before)  # expert biases count this rank's own
    assert used == ([] if is_alone else [step_group if kind == "global_aux_loss" else row_group])
    pairs = mine if is_alone else mine + others
    expected = (probs * pairs / pairs.sum(dim=-1, keepdim=True)).sum(dim=(0, 2)) * torch.tensor([7.0, 5.0])
    torch.testing.assert_close(found, expected)


def test_orthogonal_rows_have_no_orthogonality_loss():
    router = make_router(text_and_audio(orthogonality_coeff=0.1))
    torch.nn.init.orthogonal_(router.weight)
    route(router, *make_tokens())
    assert router.statistics.losses["orthogonality_loss"].sum().item() == pytest.approx(0, abs=1e-8)


def test_evaluation_has_no_losses():
    router = make_router(text_and_audio(moe_router_load_balancing_type="global_aux_loss", moe_z_loss_coeff=0.1)).eval()
    probs, _ = route(router, *make_tokens())
    (probs * 0).sum().backward()
    assert not router.weight.grad.any()
    assert not any(value.any() for value in router.statistics.losses.values())


@pytest.mark.parametrize("shares", [(0.6, 0.4), (0.95, 0.05)])
def test_pooled_balance_is_that_of_all_tokens_over_all_experts(shares):
    """``E sum_i f_i P_i`` over all valid tokens, times their number, whatever their modality; Switch's equation 4."""
    router = make_router(
        text_and_audio(moe_router_load_balancing_type="aux_loss", balance_scope="pooled", moe_aux_loss_coeff=1.0)
    )
    hidden, modality, is_padding = make_tokens(shares=shares)
    found = []
    router.losses.attach = lambda probs, losses: found.append(losses["balance_loss"]) or probs
    route(router, hidden, modality, is_padding)
    logits = reference_logits(router.moe, router.weight.detach(), hidden, flat(modality))
    valid = ~flat(is_padding)
    _, routing_map, distribution = reference_routing(router.moe, logits, flat(modality), valid)
    fractions = routing_map.float().sum(dim=0) / routing_map.sum()
    expected = logits.shape[1] * (fractions * distribution[valid].mean(dim=0)).sum() * valid.sum()
    assert torch.allclose(found[0].sum(), expected, rtol=1e-5)
