"""New weights of an import at step 0, measured with the training loss on bases whose logits spread as real ones do."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_most import parallel
from megatron_most.checkpointing import read_metadata
from megatron_most.checkpointing.directory import STATE
from megatron_most.config import DataConfig, ParallelConfig
from megatron_most.conversion import ImportOptions, import_model
from megatron_most.conversion.export_plan import stored_config
from megatron_most.conversion.verification import whole_model
from megatron_most.data.building.document_builder import DocumentBuilder
from megatron_most.data.loading.batch import Batch, make_batch
from megatron_most.data.storage.documents import TASKS
from megatron_most.training.loss import LossTable
from megatron_most.training.metrics import mean_losses
from megatron_most.vocab import VocabLayout
from tests.unit.conversion.models import VOCAB, deepseek, llama
from tests.unit.conversion.test_most import LISTS, TEXT_IDS, most, published
from tests.unit.conversion.test_round_trips import SEQUENTIAL
from tests.unit.data.tiny import row_of

CODES = 1000
LAYOUTS = ("frame", "frame_delay", "flat", "flat_delay")


def base(folder: Path, mode: str) -> None:
    """A base with large hidden states, whose head rows have a common part."""
    if mode == "most":
        model = most(folder, *LISTS["apart"])
    else:
        model = llama(folder) if mode == "upcycle" else deepseek(folder)
    config = (folder / "config.json").read_text()
    with torch.no_grad():
        model.model.norm.weight *= 4
        model.lm_head.weight += 0.1
    model.save_pretrained(folder)
    (folder / "config.json").write_text(config)  # that of MoST, which transformers does not know


def tts_batch(vocab: VocabLayout) -> Batch:
    random, rows = np.random.default_rng(1), []
    for _ in range(4):
        builder = DocumentBuilder(vocab, None, "test")
        builder.text_ids(random.integers(0, TEXT_IDS, 8))
        builder.audio(random.integers(0, vocab.codebook_size, (20, vocab.num_codebooks)), target=True)
        rows.append(row_of([builder.document()], TASKS.index("tts")))
    return make_batch(rows, vocab, DataConfig(seq_length=64, packing=False))


@torch.no_grad()
def at_step_0(checkpoint: Path) -> tuple[VocabLayout, dict[str, float], torch.Tensor, torch.Tensor]:
    """Losses of speech, logits ``[n, V]`` before its targets, and rms of the first layer's input at text and audio."""
    config = stored_config(checkpoint, read_metadata(checkpoint))
    vocab = config.vocab
    parallel.initialize(ParallelConfig(), seed=0)
    try:
        model, batch = whole_model(config, checkpoint / STATE).eval(), tts_batch(vocab)
        table = LossTable(vocab, [1.0] * vocab.num_codebooks)
        inputs = (batch.ids, batch.modality, batch.is_padding, batch.codes)
        _, _, sums = table(batch, model(*inputs, targets=batch.targets()))
        logits = model(*inputs)[0][batch.loss_mask > 0]
        embedded = model._embed(batch.ids, batch.codes).transpose(0, 1)
        used = ~batch.is_padding
        rms = [embedded[used & (batch.modality == modality)].square().mean().sqrt() for modality in (0, 1)]
        return vocab, mean_losses(table.names, sums), logits, torch.stack(rms)
    finally:
        parallel.destroy()


CASES = [(mode, layout) for mode in ("expand", "partition", "upcycle") for layout in LAYOUTS]


@pytest.mark.parametrize("mode, layout", CASES)
def test_audio_starts_at_chance_and_leaves_text_its_probability(tmp_path, mode, layout):
    base(tmp_path / "hf", mode)
    options = ImportOptions(mode, f"{layout}:2x{CODES}", overrides=SEQUENTIAL)
    vocab, losses, logits, rms = at_step_0(import_model(tmp_path / "hf", tmp_path / "native", options))
    text, new = logits[:, :VOCAB], logits[:, VOCAB:]
    assert 3 < text.std() < 8  # as of a trained base: e**5 between common and rare ids
    # Each new id, padding included, is at most as likely as the average text id, and no less than a typical one.
    torch.testing.assert_close(new, text.mean(dim=-1, keepdim=True).expand_as(new), rtol=0, atol=1e-3)
    assert (new.logsumexp(dim=-1) - text.logsumexp(dim=-1) <= math.log(new.shape[1] / VOCAB)).all()
    typical = (logits.logsumexp(dim=-1) - text.mean(dim=-1)).mean().item()
    if vocab.codec_layout.uses_side_codes:
        codes = [losses["loss/codebook_0"], losses["loss/codebook_1"]]
        assert codes == pytest.approx([math.log(CODES)] * 2, rel=0.01)  # padding takes its 24 of 1024
        assert losses["loss/audio"] <= typical + 2 * math.log(1024)
    else:
        assert losses["loss/audio"] == pytest.approx(typical, rel=0.01)
    assert 1 / 1.2 < rms[1] / rms[0] < 1.2 * math.sqrt(2)  # a frame's codes are added to the embedding of its id


def test_ids_that_a_published_model_lacks_start_at_chance(tmp_path):
    base(tmp_path / "hf", "most")
    vocab, losses, logits, _ = at_step_0(import_model(tmp_path / "hf", tmp_path / "native", published()))
    mean = logits[:, :TEXT_IDS].mean(dim=-1, keepdim=True)
    padding = logits[:, vocab.size :]
    torch.testing.assert_close(padding, mean.expand_as(padding), rtol=0, atol=1e-3)
    assert (logits[:, vocab.frame + 1 : vocab.size] - mean).std() > 3  # the units keep their rows
    assert math.isfinite(losses["loss/audio"])
