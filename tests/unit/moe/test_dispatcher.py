"""Rows of the all-to-all dispatcher: as many as there are (token, expert) pairs, in Megatron's order."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_most import parallel
from megatron_most.model import build_model
from megatron_most.moe.dispatcher import AlltoAllDispatcher
from megatron_most.moe.token_planes import pack_planes
from tests.distributed.shards import fill_weights
from tests.distributed.tiny import tiny_config
from tests.unit.moe.operators import Operators

EXPERTS, HIDDEN = 8, 32
SORTS_OR_WAITS = {"argsort", "sort", "topk", "masked_select", "nonzero", "_local_scalar_dense"}


@pytest.fixture(scope="module", autouse=True)
def process_groups():
    parallel.initialize(tiny_config().parallel, seed=1)
    yield
    parallel.destroy()


@pytest.fixture
def layer() -> MoELayer:
    groups = "[{modality: text, size: 4, moe_router_topk: 3}, {modality: audio, size: 4, moe_router_topk: 1}]"
    [model] = build_model(tiny_config(model__moe__groups=groups))
    return model.decoder.layers[1].mlp


def routing(counts: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens ``[n, 1, h]``, map and probs ``[n, E]``; token i is sent to ``counts[i]`` experts."""
    generator = torch.Generator().manual_seed(len(counts))
    routing_map = torch.zeros(len(counts), EXPERTS, dtype=torch.bool)
    for token, count in enumerate(counts):
        routing_map[token, torch.randperm(EXPERTS, generator=generator)[:count]] = True
    probs = torch.rand(len(counts), EXPERTS, generator=generator) * routing_map
    return torch.randn(len(counts), 1, HIDDEN, generator=generator), routing_map, probs


def there_and_back(dispatcher: AlltoAllDispatcher, counts: list[int]) -> dict[str, torch.Tensor]:
    """What experts are given when each answers with its tokens times their probs, what comes back, and gradients."""
    tokens, routing_map, probs = routing(counts)
    tokens.requires_grad_(), probs.requires_grad_()
    rows, row_probs = dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(tokens, routing_map, probs))
    rows, tokens_per_expert, row_probs = dispatcher.dispatch_postprocess(rows, row_probs)
    answers = dispatcher.token_combine(dispatcher.combine_preprocess(rows * row_probs[:, None]))
    output = dispatcher.combine_postprocess(answers)
    output.backward(torch.arange(output.numel(), dtype=torch.float).view(output.shape))
    found = {"rows": rows, "probs": row_probs, "counts": tokens_per_expert, "output": output}
    return {**found, "tokens.grad": tokens.grad, "probs.grad": probs.grad * routing_map}


def one_by_one(counts: list[int]) -> dict[str, torch.Tensor]:
    """The same, expert by expert and token by token."""
    tokens, routing_map, probs = routing(counts)
    pairs = [(expert, token) for expert in range(EXPERTS) for token in range(len(counts)) if routing_map[token, expert]]
    of_pairs = [token for _, token in pairs]
    given = torch.arange(tokens.numel(), dtype=torch.float).view(tokens.shape)
    return {
        "rows": tokens[of_pairs, 0],
        "probs": torch.tensor([probs[token, expert] for expert, token in pairs]),
        "counts": routing_map.sum(dim=0),
        "output": tokens * probs.sum(dim=1)[:, None, None],
        "tokens.grad": given * probs.sum(dim=1)[:, None, None],
        "probs.grad": (given * tokens).sum(dim=-1) * routing_map,
    }


COUNTS = {
    "all alike": [3] * 9,
    "padding between": [3, 0, 3, 0, 0, 3, 3],
    "the first is padding": [0, 0, 3, 1],
    "unequal top-k": [3, 1, 1, 3, 1, 0, 3],
    "padding alone": [0] * 5,
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_experts_get_exactly_the_pairs_and_tokens_get_their_sums(layer: MoELayer, counts: list[int]) -> None:
    check(there_and_back(layer.token_dispatcher, counts), one_by_one(counts))


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_a_fused_permutation_is_asked_for_exactly_the_pairs(
    layer: MoELayer, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformer Engine leaves what follows the last pair as it finds it; NaN stands for that here."""
    dispatcher = layer.token_dispatcher
    monkeypatch.setattr(dispatcher.config, "moe_permute_fusion", True)
    monkeypatch.setattr(moe_utils, "HAVE_TE", True)
    monkeypatch.setattr(moe_utils, "fused_permute_and_pad_with_probs", None)
    monkeypatch.setattr(moe_utils, "fused_permute_with_probs", as_fused_permute)
    monkeypatch.setattr(moe_utils, "fused_unpermute", as_fused_unpermute)
    monkeypatch.setattr(moe_utils, "is_te_min_version", lambda version: False)
    check(there_and_back(dispatcher, counts), one_by_one(counts))


def test_nothing_is_sorted_no_shape_waits_for_the_device_and_rows_are_added_in_one_order(layer: MoELayer) -> None:
    """Additions to rows of bf16 by atomic operations are slow on a GPU, and no two runs of them are alike."""
    with Operators() as operators:
        there_and_back(layer.token_dispatcher, COUNTS["unequal top-k"])
    assert not operators.counts.keys() & SORTS_OR_WAITS
    # Gradients of probs, a number each and each in a place of its own, are put there by the one index_add.
    assert operators.counts["index_add"] == 1 and not operators.counts.keys() & {"scatter_add", "scatter_add_"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_repeats_one_number_is_taken(layer: MoELayer, dtype: torch.dtype) -> None:
    dispatcher, counts = layer.token_dispatcher, COUNTS["unequal top-k"]
    tokens, routing_map, probs = routing(counts)
    tokens = tokens.to(dtype).requires_grad_()
    rows, row_probs = dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(tokens, routing_map, probs))
    rows, _, _ = dispatcher.dispatch_postprocess(rows, row_probs)
    rows.sum().backward()
    wanted = torch.tensor(counts, dtype=dtype)[:, None, None].expand_as(tokens)
    assert tokens.grad.dtype == dtype and torch.equal(tokens.grad, wanted)


def layer_output(overlap: str) -> list[torch.Tensor]:
    """Output and gradient of a layer with the weights that all its variants have."""
    chunks = build_model(tiny_config(model__moe__moe_shared_expert_overlap=overlap))
    fill_weights(chunks)
    hidden = torch.randn(6, 2, HIDDEN, generator=torch.Generator().manual_seed(0)).requires_grad_()
    modality = torch.tensor([[0, 1, 1, 0, 0, 1], [1, 0, 0, 1, 0, 0]])
    planes = pack_planes(modality, torch.zeros_like(modality, dtype=torch.bool), 2)
    output, _ = chunks[0].decoder.layers[1].mlp(hidden, padding_mask=planes)
    return [output, *torch.autograd.grad(output.square().sum(), hidden)]


def test_shared_experts_that_overlap_with_the_dispatch_add_the_same() -> None:
    for found, expected in zip(layer_output("true"), layer_output("false"), strict=True):
        torch.testing.assert_close(found, expected)


def check(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


def as_fused_permute(tokens, probs, routing_map, num_out_tokens):
    """Transformer Engine's ``moe_permute_with_probs`` in the parts that Megatron uses."""
    experts, of_pairs = routing_map.T.nonzero(as_tuple=True)
    unused = tokens.new_full((num_out_tokens - len(of_pairs), tokens.shape[1]), torch.nan)
    rows = torch.cat([tokens[of_pairs], unused])
    return rows, torch.cat([probs[of_pairs, experts], unused[:, 0]]), (experts, of_pairs)


def as_fused_unpermute(rows, row_id_map, merging_probs, restore_shape):
    _, of_pairs = row_id_map
    return rows.new_zeros(restore_shape).index_add(0, of_pairs, rows[: len(of_pairs)])
