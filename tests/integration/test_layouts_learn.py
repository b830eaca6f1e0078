"""In every layout a model learns a sentence's speech by heart and then says it, code by code, when given the text."""

import numpy as np
import pytest
import torch

from megatron_most import parallel
from megatron_most.config import DataConfig
from megatron_most.data.building.tasks import make_document, prompt
from megatron_most.data.loading.batch import make_batch
from megatron_most.inference.generator import Generator
from megatron_most.inference.sampling import Sampling
from megatron_most.model import build_model
from megatron_most.training.loss import LossTable
from megatron_most.vocab import CODEC_LAYOUTS
from tests.distributed.tiny import CODEBOOK_SIZE, tiny_config
from tests.unit.data.tiny import LetterTokenizer, row_of

TEXTS = ("a fox", "the dog")


@pytest.mark.parametrize("layout_name", CODEC_LAYOUTS)
def test_what_was_learned_by_heart_is_said(layout_name):
    config = tiny_config(vocab__layout=layout_name, vocab__num_codebooks=3, data__seq_length=64, model__num_layers=2)
    parallel.initialize(config.parallel, seed=1)
    (model,) = build_model(config)
    codes = [np.random.default_rng(seed).integers(0, CODEBOOK_SIZE, (3, 5 + seed)).T for seed in range(2)]
    rows = [
        row_of([make_document("tts", config.vocab, LetterTokenizer(), text=text, codes=spoken)])
        for text, spoken in zip(TEXTS, codes, strict=True)
    ]
    batch = make_batch(rows, config.vocab, DataConfig(seq_length=64, packing=False))
    loss_table = LossTable(config.vocab, [1.0] * 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(120):
        losses = model(
            batch.ids, batch.modality, batch.is_padding,
            codes=batch.codes, targets=batch.targets(),
        )  # fmt: skip
        loss, count, table = loss_table(batch, losses)
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
    counts = [int(table[loss_table.names.index(f"loss/codebook_{k}"), 1]) for k in range(3)]
    assert counts == [sum(len(spoken) for spoken in codes)] * 3
    prompts = [prompt("tts", config.vocab, LetterTokenizer(), text=text) for text in TEXTS]
    for found, spoken in zip(Generator(model).speech(prompts, 12, Sampling()), codes, strict=True):
        np.testing.assert_array_equal(found, spoken)
