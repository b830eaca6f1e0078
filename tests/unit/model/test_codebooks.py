"""Codebooks: a position may have labels of some of them only, as delayed codes do at both ends."""

import pytest
import torch

from megatron_most import parallel
from megatron_most.data.loading.batch import Targets
from megatron_most.model import MoSTModel, build_model
from megatron_most.vocab import NO_CODE
from tests.distributed.shards import fill_weights
from tests.distributed.tiny import tiny_config


@pytest.fixture(scope="module")
def model() -> MoSTModel:
    config = tiny_config(vocab__layout="frame_delay")
    parallel.initialize(config.parallel, seed=1)
    [chunk] = build_model(config)
    fill_weights([chunk], std=0.3)
    return chunk


def test_the_loss_is_cross_entropy_where_there_is_a_label_and_zero_elsewhere(model: MoSTModel) -> None:
    weights = model.codebook_heads.weight
    num_codebooks, _, hidden_size = weights.shape
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 2, hidden_size, generator=generator, requires_grad=True)
    labels = torch.randint(0, 5, (6, 2, num_codebooks), generator=generator)
    labels[0, 0, 1:] = labels[5, 0, 0] = NO_CODE
    labels[2, 1] = NO_CODE
    coded = torch.tensor([place for place in range(12) if place != 2 * 2 + 1])
    nothing = torch.zeros(0, dtype=torch.long)
    losses = model.losses(hidden, Targets(nothing, nothing, coded, labels.flatten(0, 1)[coded]))
    assert not losses[..., 0].any()
    for codebook, weight in enumerate(weights):
        logits = (hidden @ weight.T).transpose(0, 1)
        expected = torch.nn.functional.cross_entropy(
            logits.reshape(12, -1), labels[..., codebook].T.reshape(12), ignore_index=NO_CODE, reduction="none"
        )
        torch.testing.assert_close(losses[..., 1 + codebook].reshape(12), expected)
    losses.sum().backward()
    assert not hidden.grad[2, 1].any() and hidden.grad[0, 0].any()


def test_an_embedding_is_the_sum_of_the_codes_that_are_there(model: MoSTModel) -> None:
    tables = model.codebook_embeddings.weight
    codes = torch.tensor([[[3, 5], [NO_CODE, 5], [NO_CODE, NO_CODE]], [[3, NO_CODE], [0, 0], [3, 5]]])
    embeddings = model.codebook_embeddings(codes)
    expected = torch.zeros(3, 2, tables.shape[-1])
    for row, position, codebook in (codes != NO_CODE).nonzero().tolist():
        expected[position, row] += tables[codebook, codes[row, position, codebook]]
    assert torch.equal(embeddings, expected)
    tables.grad = None
    embeddings.sum().backward()
    times = torch.zeros(tables.shape[:2])
    times[0, 3], times[1, 5], times[0, 0], times[1, 0] = 3, 3, 1, 1
    assert torch.equal(tables.grad, times[..., None].expand_as(tables))
