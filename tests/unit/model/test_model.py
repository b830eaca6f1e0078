"""The model in one process: its size, packed documents, batches of one modality, hidden frames."""

import dataclasses

import pytest
import torch

from megatron_most import parallel
from megatron_most.data.loading.batch import Batch
from megatron_most.model import MoSTModel, build_model, count_parameters
from megatron_most.model.packed_row import PackedRow
from megatron_most.training.microbatches import packed_seq_params
from megatron_most.vocab import NO_CODE
from tests.distributed.shards import fill_weights
from tests.distributed.tiny import tiny_batch, tiny_config


@pytest.fixture(scope="module", autouse=True)
def process_groups():
    parallel.initialize(tiny_config().parallel, seed=1)
    yield
    parallel.destroy()


def built(config) -> MoSTModel:
    [chunk] = build_model(config)
    fill_weights([chunk])
    return chunk


def losses(model: MoSTModel, batch: Batch, packed: PackedRow | None = None) -> torch.Tensor:
    return model(
        batch.ids,
        batch.modality,
        batch.is_padding,
        codes=batch.codes,
        targets=batch.targets(),
        packed_seq_params=packed,
    )


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"vocab__layout": "flat"},
        {"model__attention__q_lora_rank": 12},
        {"model__first_k_dense_replace": 0, "model__moe__moe_shared_expert_intermediate_size": 0},
        {"model__first_k_dense_replace": 3},
    ],
)
def test_parameter_count_is_the_built_models(overrides):
    config = tiny_config(**overrides)
    [model] = build_model(config)
    counts = count_parameters(config)
    assert counts["total"] == sum(parameter.numel() for parameter in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name)
    assert counts["experts/text"] + counts["experts/audio"] == experts


def test_deepseek_v2_lite_is_counted_as_published():
    """15.706 B parameters: 64 experts as two groups of 32, and 102400 ids (ours add three, padded to 102528)."""
    config = tiny_config()
    lite = type(config.model)()
    config = dataclasses.replace(config, model=lite, vocab=dataclasses.replace(config.vocab, text_vocab_size=102400))
    counts = count_parameters(config)
    padding = 2 * 128 * lite.hidden_size
    codebooks = 2 * 2 * 128 * lite.hidden_size
    assert counts["total"] - padding - codebooks == 15_706_484_224


def test_packed_documents_have_the_losses_they_have_alone():
    config = tiny_config(data__packing=True, training__micro_batch_size=1)
    model, batch = built(config), tiny_batch(config, seed=5)
    together = losses(model, batch, packed_seq_params(batch))
    for start, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        fields = {
            field.name: getattr(batch, field.name)[:, start:end]
            for field in dataclasses.fields(batch)
            if field.name not in ("cu_seqlens", "packed_row", "positions")
        }
        alone = losses(model, Batch(**fields, cu_seqlens=None))
        torch.testing.assert_close(together[:, start:end], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("audio_share", [0.0, 1.0])
def test_a_batch_of_one_modality_gives_zero_not_missing_gradients(audio_share):
    config = tiny_config()
    model, batch = built(config), tiny_batch(config, seed=1, audio_share=audio_share)
    (losses(model, batch) * batch.loss_mask[..., None]).sum().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == []
    experts = model.decoder.layers[1].mlp.experts
    used, unused = ("text", "audio") if audio_share == 0 else ("audio", "text")
    for weight in getattr(experts, f"{unused}_experts").parameters():
        assert torch.count_nonzero(weight.grad) == 0
    for weight in getattr(experts, f"{used}_experts").parameters():
        assert torch.count_nonzero(weight.grad) > 0


def test_a_hidden_frame_is_read_as_a_frame_without_codes():
    config = tiny_config()
    model, batch = built(config), tiny_batch(config, seed=2)
    [*_, (row, position)] = torch.nonzero(batch.ids == config.vocab.frame).tolist()
    before = losses(model, batch)
    batch.codes[row, position] = NO_CODE
    after = losses(model, batch)
    assert torch.equal(before[row, :position], after[row, :position])
    assert not torch.equal(before[row, position], after[row, position])


def test_positions_without_code_label_have_no_codebook_loss():
    config = tiny_config()
    batch = tiny_batch(config, seed=3)
    per_slot = losses(built(config), batch)
    has_code = batch.code_labels[..., 0] != NO_CODE
    assert torch.equal(per_slot[..., 1] > 0, has_code) and torch.equal(per_slot[..., 2] > 0, has_code)
