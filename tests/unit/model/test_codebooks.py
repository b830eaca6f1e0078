"""Heads of the codebooks: a position may have labels of some codebooks only, as delayed codes do at both ends."""

import pytest
import torch

from megatron_most import parallel
from megatron_most.model import build_model
from megatron_most.vocab import NO_CODE
from tests.distributed.shards import fill_weights
from tests.distributed.tiny import tiny_config


@pytest.fixture(scope="module")
def heads():
    config = tiny_config(vocab__layout="frame_delay")
    parallel.initialize(config.parallel, seed=1)
    chunks = build_model(config)
    fill_weights(chunks, std=0.3)
    return chunks[0].codebook_heads


def test_the_loss_is_cross_entropy_where_there_is_a_label_and_zero_elsewhere(heads):
    num_codebooks, _, hidden_size = heads.weight.shape
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 2, hidden_size, generator=generator, requires_grad=True)
    labels = torch.randint(0, 5, (2, 6, num_codebooks), generator=generator)
    labels[0, 0, 1:] = labels[0, 5, 0] = NO_CODE
    labels[1, 2] = NO_CODE
    losses = heads.loss(hidden, labels)
    for codebook, weight in enumerate(heads.weight):
        logits = (hidden @ weight.T).transpose(0, 1).float()
        expected = torch.nn.functional.cross_entropy(
            logits.reshape(12, -1), labels[..., codebook].reshape(12), ignore_index=NO_CODE, reduction="none"
        )
        torch.testing.assert_close(losses[..., codebook].reshape(12), expected)
    losses.sum().backward()
    assert not hidden.grad[2, 1].any() and hidden.grad[0, 0].any()
