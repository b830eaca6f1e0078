"""Heads and losses where there is a target: the same numbers as everywhere, with few operators and no waiting."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_most import parallel
from megatron_most.data.loading.batch import Batch
from megatron_most.model import MoSTModel, build_model, target_rows
from megatron_most.model.target_rows import cross_entropy, put_rows, take_rows
from megatron_most.training.loss import LossTable
from tests.distributed.shards import fill_weights
from tests.distributed.tiny import tiny_batch, tiny_config

_MOVES_NO_DATA = {"alias", "detach", "empty", "expand", "select", "split", "split_with_sizes", "t", "transpose",
                  "unsqueeze", "view", "_unsafe_view", "empty_like", "slice", "squeeze", "unbind"}  # fmt: skip
_WAITS = {"_local_scalar_dense", "equal", "is_nonzero", "masked_scatter", "masked_select", "nonzero"}


class Operators(TorchDispatchMode):
    """Counts operators by name, those left out that only look at a tensor in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        if name not in _MOVES_NO_DATA:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module", autouse=True)
def process_groups():
    parallel.initialize(tiny_config().parallel, seed=1)
    yield
    parallel.destroy()


def built(**overrides: Any) -> tuple[MoSTModel, Batch, torch.Tensor]:
    """A model, a batch, and hidden states for it."""
    config = tiny_config(**overrides)
    [model] = build_model(config)
    fill_weights([model])
    batch = tiny_batch(config, seed=3)
    hidden = torch.randn(config.data.seq_length, len(batch.ids), 32, generator=torch.Generator().manual_seed(0))
    return model, batch, hidden.to(model.config.params_dtype).requires_grad_()


@pytest.mark.parametrize("layout", ["frame", "frame_delay", "flat"])
def test_gradients_equal_those_with_all_positions(layout: str) -> None:
    model, batch, hidden = built(vocab__layout=layout)
    everywhere = dataclasses.replace(batch, loss_mask=torch.ones_like(batch.loss_mask))
    assert 0 < len(batch.targets().index) < len(everywhere.targets().index)
    weights = torch.rand(3 if model.codebook_heads else 1)
    results = []
    for targets in (batch.targets(), everywhere.targets()):
        model.zero_grad()
        hidden.grad = None
        losses = model.losses(hidden, targets) * batch.loss_mask[..., None]
        (losses * weights).sum().backward()
        heads = [model.output_layer] + ([model.codebook_heads] if model.codebook_heads else [])
        results.append([losses.detach(), hidden.grad, *(head.weight.grad for head in heads)])
    for found, expected in zip(*results, strict=True):
        assert expected.any() and torch.equal(found, expected)


def test_a_batch_without_targets_has_no_loss_and_zero_gradients() -> None:
    model, batch, hidden = built()
    batch = dataclasses.replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))
    losses = model.losses(hidden, batch.targets())
    assert losses.shape == (2, 32, 3) and not losses.any()
    losses.sum().backward()
    for gradient in (hidden.grad, model.output_layer.weight.grad, model.codebook_heads.weight.grad):
        assert gradient is not None and not gradient.any()


def test_rows_are_taken_and_put_back() -> None:
    rows = torch.randn(6, 4, dtype=torch.double, requires_grad=True)
    index = torch.tensor([4, 0, 5])
    assert torch.equal(take_rows(rows, index), rows[index])
    assert torch.autograd.gradcheck(lambda rows: take_rows(rows, index), rows)
    assert torch.equal(put_rows(rows[:3], index, 6)[index], rows[:3])
    assert not put_rows(rows[:3], index, 6)[[1, 2, 3]].any()


class OverwritingKernel(torch.autograd.Function):
    """What Transformer Engine's kernel does to its arguments: three axes, the gradient in the place of the logits."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, group: object, is_cg_capturable: bool
    ) -> torch.Tensor:
        assert logits.dim() == 3 and logits.is_contiguous() and labels.is_contiguous() and is_cg_capturable
        assert labels.min() >= 0
        ctx.save_for_backward(logits.detach(), labels)
        losses = torch.nn.functional.cross_entropy(logits[0].float(), labels[0], reduction="none")
        return losses[None]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        assert gradient.is_contiguous()
        logits, labels = ctx.saved_tensors
        probs = logits.float().softmax(dim=-1)
        probs[0, torch.arange(labels.shape[1]), labels[0]] -= 1
        logits.data.copy_(probs * gradient[..., None])
        return logits, None, None, None


def test_a_kernel_that_writes_over_the_logits_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, hidden = built(precision__dtype="bf16", vocab__layout="frame_delay")
    results = []
    for kernel in (None, OverwritingKernel.apply):
        monkeypatch.setattr(target_rows, "_fused_cross_entropy", lambda logits, kernel=kernel: kernel)
        model.zero_grad()
        hidden.grad = None
        losses = model.losses(hidden, batch.targets())
        assert losses.dtype == torch.float32
        (losses * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        results.append([losses.detach(), hidden.grad, model.output_layer.weight.grad, model.codebook_heads.weight.grad])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-3)


def test_the_kernel_is_given_a_gradient_without_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_rows, "_fused_cross_entropy", lambda logits: OverwritingKernel.apply)
    logits = torch.randn(3, 8, requires_grad=True)
    labels = torch.tensor([1, 2, 3])
    # The gradient of a sum is one number, repeated by a stride of 0.
    cross_entropy(logits.clone(), labels, torch.distributed.group.WORLD).sum().backward()
    torch.testing.assert_close(logits.grad, logits.detach().softmax(-1) - torch.nn.functional.one_hot(labels, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_for_bf16_on_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_rows.transformer_engine, "te_parallel_cross_entropy", OverwritingKernel.apply)
    logits = torch.randn(3, 8).to(dtype)
    assert target_rows._fused_cross_entropy(logits) is None
    labels = torch.tensor([1, 2, 3])
    expected = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    torch.testing.assert_close(cross_entropy(logits, labels, torch.distributed.group.WORLD), expected)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_ends_of_13_codebooks_take_few_operators_and_wait_for_nothing(dtype: str) -> None:
    options = {"vocab__num_codebooks": 13, "model__codebook_loss_weights": str([1.0] * 13)}
    model, batch, hidden = built(precision__dtype=dtype, **options)
    flat, _, _ = built(precision__dtype=dtype, vocab__layout="flat")
    targets = batch.targets()
    with Operators() as embeddings:
        total = model.codebook_embeddings(batch.codes)
        total.backward(torch.ones_like(total))
    with Operators() as text:
        losses = flat.losses(hidden, targets)
        losses.backward(torch.ones_like(losses))
    with Operators() as heads:
        losses = model.losses(hidden, targets)
        losses.backward(torch.ones_like(losses))
    losses = losses.detach().requires_grad_()
    table = LossTable(tiny_config(**options).vocab, [1.0] * 13)
    table(batch, losses)
    with Operators() as metrics:
        table(batch, losses)[0].backward()
    of_codebooks = embeddings.counts.total() + heads.counts.total() - text.counts.total()
    assert of_codebooks <= 60, f"{embeddings.counts} {heads.counts}"  # 608 in fp32 with a table and a head for each
    assert text.counts.total() <= 42 and metrics.counts.total() <= 40, f"{text.counts} {metrics.counts}"
    for operators in (embeddings, text, heads, metrics):
        assert not operators.counts.keys() & _WAITS
    assert "lift_fresh" not in metrics.counts, "a list is copied to the device"
