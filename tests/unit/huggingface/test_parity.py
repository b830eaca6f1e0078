"""The exported model against the native one: logits, losses, caches and padding."""

from __future__ import annotations

import pytest
import torch

from megatron_most.training.loss import LossTable
from megatron_most.vocab import NO_CODE
from tests.distributed.tiny import tiny_batch
from tests.unit.huggingface.exports import CASES, config_of, exported_model, native_model, parameters

TOLERANCE = 1e-5  # of the largest


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape and expected.std() > 0.05
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("case", parameters(CASES))
@torch.no_grad()
def test_logits_and_loss_are_the_native_models(case):
    config, model = config_of(case), exported_model(case)
    batch = tiny_batch(config, seed=3, rows=3)
    with native_model(case) as native:
        inputs = (batch.ids, batch.modality, batch.is_padding, batch.codes)
        logits, code_logits = native(*inputs)
        slots = native(*inputs, targets=batch.targets())
    table = LossTable(config.vocab, config.model.codebook_weights(config.vocab), config.model.text_loss_weight)
    loss_sum, count, _ = table(batch, slots)

    # Labels stand where the ids they name do, so each row has one position more.
    is_target = batch.loss_mask > 0
    nothing = torch.full_like(batch.labels[:, :1], -100)
    labels = torch.cat([nothing, batch.labels.where(is_target, -100)], dim=1)
    ids = torch.cat([batch.ids, batch.labels[:, -1:]], dim=1)
    mask = torch.cat([~batch.is_padding, torch.ones_like(is_target[:, :1])], dim=1).long()
    codes = code_labels = None
    if batch.codes is not None:
        no_code = torch.full_like(batch.codes[:, :1], NO_CODE)
        codes = torch.cat([batch.codes, no_code], dim=1)
        code_labels = torch.cat([no_code, batch.code_labels], dim=1)
    found = model(ids, codes, mask, labels=labels, code_labels=code_labels)
    is_real = ~batch.is_padding
    assert_close(found.logits[:, :-1][is_real], logits[is_real])
    if batch.codes is None:
        assert found.code_logits is None
    else:
        assert_close(found.code_logits[:, :-1][is_real], code_logits[is_real])
    assert found.loss.item() == pytest.approx((loss_sum / count).item(), rel=1e-5)


@pytest.mark.parametrize("case", parameters(["frame", "flat", "gqa_yarn", "q_lora", "per_modality"]))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_cache_and_left_padding_change_nothing(case, attention):
    config, model = config_of(case), exported_model(case)
    model.set_attn_implementation(attention)
    batch = tiny_batch(config, seed=4, rows=1)
    length = 24
    ids, codes = batch.ids[:, :length], None if batch.codes is None else batch.codes[:, :length]
    whole = model(ids, codes)
    # A second row of padding, and the same tokens behind it: once whole, once position after position.
    pad = 5
    both = torch.cat([torch.nn.functional.pad(ids, (pad, 0)), batch.ids[:, : length + pad]])
    mask = torch.ones_like(both)
    mask[0, :pad] = 0
    both_codes = None
    if codes is not None:
        row = torch.nn.functional.pad(codes, (0, 0, pad, 0), value=NO_CODE)
        both_codes = torch.cat([row, batch.codes[:, : length + pad]])
    padded = model(both, both_codes, mask)
    assert_close(padded.logits[:1, pad:], whole.logits)
    cache, logits = None, []
    for stop in [10, *range(11, length + pad + 1)]:
        start = stop - 1 if stop > 10 else 0
        step = model(
            both[:, start:stop],
            None if both_codes is None else both_codes[:, start:stop],
            mask[:, :stop],
            past_key_values=cache,
            use_cache=True,
        )
        cache = step.past_key_values
        logits.append(step.logits)
    assert_close(torch.cat(logits, dim=1)[:1, pad:], whole.logits)
    assert_close(torch.cat(logits, dim=1)[1], padded.logits[1])


def test_gradients_reach_every_weight_and_checkpointing_leaves_them_alone():
    config, model = config_of("frame"), exported_model("frame")
    batch = tiny_batch(config, seed=5, rows=4)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        labels = batch.ids.where(~batch.is_padding, -100)
        model(batch.ids, batch.codes, (~batch.is_padding).long(), labels=labels).loss.backward()
        return {name: weight.grad for name, weight in model.named_parameters()}

    plain = gradients()
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in plain.values())
    model.train()
    model.gradient_checkpointing_enable()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name])


def test_experts_one_after_the_other_compute_what_the_grouped_product_does(monkeypatch):
    config, model = config_of("frame"), exported_model("frame")
    batch = tiny_batch(config, seed=6)
    with torch.no_grad():
        grouped = model(batch.ids, batch.codes).logits
        monkeypatch.delattr(torch.nn.functional, "grouped_mm")
        assert_close(model(batch.ids, batch.codes).logits, grouped)


@torch.no_grad()
def test_bf16_keeps_the_biases_that_steer_choices_in_fp32():
    from megatron_most.huggingface import MoSTForConditionalGeneration
    from tests.unit.huggingface.exports import exported

    model = MoSTForConditionalGeneration.from_pretrained(exported("bias")[1], dtype=torch.bfloat16)
    dtypes = {name: weight.dtype for name, weight in model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "bias" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "bias" not in name} == {torch.bfloat16}
