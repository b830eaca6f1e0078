"""Codec frames under every kind of parallelism: batches of one modality, losses and gradients of each codebook."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megatron_most import parallel
from megatron_most.config import RunConfig
from megatron_most.data.loading.batch import Batch
from megatron_most.data.loading.loader import train_batches
from megatron_most.model import build_model
from megatron_most.model.target_rows import cross_entropy
from megatron_most.training.loss import LossTable
from megatron_most.vocab import NO_CODE
from tests.distributed.harness import run_ranks
from tests.distributed.observe import Observation, assert_same, observe
from tests.distributed.shards import Piece, assemble, fill_weights, local_pieces
from tests.distributed.tiny import tiny_batch, tiny_config
from tests.integration.tiny_run import run_config

pytestmark = pytest.mark.invariance

TP2 = {"parallel__tensor_model_parallel_size": 2}
PP2 = {"parallel__pipeline_model_parallel_size": 2}
CP2 = {"parallel__context_parallel_size": 2}
LAYOUTS = {"tp2": TP2, "pp2": PP2, "cp2": CP2}
PACKED = {"data__packing": True, "data__document_multiple": 4, "training__micro_batch_size": 1}
WEIGHTS = "model__codebook_loss_weights"
# Tables are padded to 128 codes: with these, both tensor ranks hold codes that occur.
NUM_CODES = 100
SMALL = {"model__num_layers": 2, "vocab__codebook_size": NUM_CODES}

VARIANTS: dict[str, dict[str, Any]] = {
    "frame": {},
    "frame-packed": PACKED,
    "frame-weights": {WEIGHTS: "[0.25, 2.0]"},
    "flat": {"vocab__layout": "flat"},
    "flat-packed": {"vocab__layout": "flat", **PACKED},
    "flat-weights": {"vocab__layout": "flat", WEIGHTS: "[0.25, 2.0]"},
}
NUM_MICROBATCHES = 2


def of_one_modality(audio_share: float, config: RunConfig, step: int) -> list[Batch]:
    return [tiny_batch(config, seed, audio_share) for seed in range(NUM_MICROBATCHES)]


def observe_all(overrides: dict[str, Any]) -> dict[tuple[str, str], Observation]:
    """Every variant with text alone and with audio alone, one after another on the same ranks."""
    return {
        (variant, name): observe({**SMALL, **options, **overrides}, 1, functools.partial(of_one_modality, share))
        for variant, options in VARIANTS.items()
        for name, share in (("text", 0.0), ("audio", 1.0))
    }


@functools.cache
def one_process() -> dict[tuple[str, str], Observation]:
    return run_ranks(1, observe_all, {})[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_of_one_modality_equal_one_process(layout):
    ranks = run_ranks(2, observe_all, LAYOUTS[layout])
    for case, expected in one_process().items():
        assert_same([rank[case] for rank in ranks], expected)


def codebook_gradients(observation: Observation) -> dict[str, torch.Tensor]:
    gradients = assemble([observation.gradients])
    return {name: gradient for name, gradient in gradients.items() if "codebook" in name}


def test_text_alone_gives_codebooks_zero_gradients_and_audio_gives_each_its_own():
    for variant in ("frame", "frame-packed"):
        text = codebook_gradients(one_process()[variant, "text"])
        audio = codebook_gradients(one_process()[variant, "audio"])
        assert len(text) == len(audio) == 2 * 2  # a table and a head for each of two codebooks
        assert not any(gradient.any() for gradient in text.values())
        assert all(gradient.any() for gradient in audio.values())


def losses_of(observation: Observation, config: RunConfig) -> dict[str, tuple[float, float]]:
    names = LossTable(config.vocab, config.model.codebook_weights(config.vocab)).names
    return {name: tuple(row) for name, row in zip(names, observation.table, strict=True)}


@pytest.mark.parametrize("layout", ["frame", "flat"])
def test_weights_scale_the_loss_of_their_codebook_alone(layout):
    config = tiny_config(vocab__layout=layout)
    plain = losses_of(one_process()[layout, "audio"], config)
    weighted = losses_of(one_process()[f"{layout}-weights", "audio"], config)
    (first, _), (second, _) = plain["loss/codebook_0"], plain["loss/codebook_1"]
    for name in ("loss/codebook_0", "loss/codebook_1", "tokens"):
        assert weighted[name] == plain[name]
    change = (0.25 - 1) * first + (2 - 1) * second
    assert weighted["loss/audio"][0] - plain["loss/audio"][0] == pytest.approx(change, rel=1e-5)
    assert weighted["loss"] == weighted["loss/audio"]


def test_weights_scale_the_gradient_of_their_head_alone():
    plain = codebook_gradients(one_process()["frame", "audio"])
    weighted = codebook_gradients(one_process()["frame-weights", "audio"])
    for name, weight in (("codebook_heads.heads.0.weight", 0.25), ("codebook_heads.heads.1.weight", 2.0)):
        torch.testing.assert_close(weighted[name], plain[name] * weight, rtol=1e-5, atol=1e-9)


def hidden_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states ``[s, b, h]`` and code labels ``[b, s, C]``, some of them missing."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(32, 2, 32, generator=generator)
    labels = torch.randint(0, NUM_CODES, (2, 32, 2), generator=generator)
    labels[torch.rand(2, 32, generator=generator) < 0.4] = NO_CODE
    return hidden, labels


def heads_alone() -> tuple[torch.Tensor, torch.Tensor, list[Piece]]:
    """Losses of the heads under tensor and sequence parallelism, this rank's gradient of ``hidden``, and the heads."""
    config = tiny_config(**SMALL, **TP2)
    parallel.initialize(config.parallel, seed=1)
    chunks = build_model(config)
    fill_weights(chunks)
    hidden, labels = hidden_and_labels()
    mine = hidden.chunk(2)[parallel_state.get_tensor_model_parallel_rank()].clone().requires_grad_()
    group = parallel_state.get_tensor_model_parallel_group()
    whole = gather_from_sequence_parallel_region(mine, tensor_parallel_output_grad=True, group=group)
    logits = chunks[0].codebook_heads(whole.transpose(0, 1))
    losses = cross_entropy(logits, labels.clamp(min=0), group) * (labels != NO_CODE)
    (losses * torch.tensor([1.0, 3.0])).sum().backward()
    pieces = [piece for piece in local_pieces(chunks) if "codebook_heads" in piece[0]]
    return losses.detach(), mine.grad, [(key, shape, at, view.detach().clone()) for key, shape, at, view in pieces]


def test_cross_entropy_over_split_codes_equals_the_whole_one():
    ranks = run_ranks(2, heads_alone)
    weights = assemble(pieces for _, _, pieces in ranks)
    hidden, labels = hidden_and_labels()
    hidden.requires_grad_()
    expected = torch.zeros(2, 32, 2)
    has_label = labels[..., 0] != NO_CODE
    for codebook in range(2):
        logits = hidden.transpose(0, 1) @ weights[f"codebook_heads.heads.{codebook}.weight"].t()
        loss = F.cross_entropy(logits[has_label], labels[has_label][:, codebook], reduction="none")
        expected[..., codebook] = expected[..., codebook].masked_scatter(has_label, loss)
    (expected * torch.tensor([1.0, 3.0])).sum().backward()
    for losses, _, _ in ranks:
        torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-6)
    gradient = torch.cat([mine for _, mine, _ in ranks])
    torch.testing.assert_close(gradient, hidden.grad, rtol=1e-5, atol=1e-6)


def hidden_frames(config: RunConfig) -> tuple[int, list[torch.Tensor]]:
    """This rank's place among the replicas, and ids and codes of its first four micro-batches."""
    parallel.initialize(config.parallel, config.seed)
    dp_rank, dp_size = parallel.data_parallel_place()
    batches = train_batches(config, dp_rank=dp_rank, dp_size=dp_size, consumed_samples=0)
    taken = [next(batches) for _ in range(4)]
    return dp_rank, [torch.cat([batch.ids[..., None], batch.codes], dim=-1) for batch in taken]


def test_ranks_that_share_a_row_hide_the_same_frames(tmp_path: Path):
    options = {"data__audio_frame_dropout": 0.5, "training__micro_batch_size": 1, "training__global_batch_size": 8}
    ranks = run_ranks(4, hidden_frames, run_config(tmp_path, **options, **TP2))
    [(_, alone)] = run_ranks(1, hidden_frames, run_config(tmp_path, **options))
    frame = tiny_config().vocab.frame
    for rank, (dp_rank, batches) in enumerate(ranks):
        assert dp_rank == rank // 2
        for mine, shared in zip(batches, ranks[rank ^ 1][1], strict=True):
            assert torch.equal(mine, shared)
        # The rows of one process, dealt out to the two replicas.
        for index in (0, 1):
            assert torch.equal(batches[index], alone[2 * index + dp_rank])
    frames = torch.cat([batch[batch[..., 0] == frame] for batch in alone])
    is_hidden = frames[:, 1] == NO_CODE
    assert 0.1 < is_hidden.float().mean() < 0.6
    assert torch.equal(is_hidden, (frames[:, 1:] == NO_CODE).any(dim=-1))
