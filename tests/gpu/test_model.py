"""The portable spec on a GPU: the CPU's fp32 numbers in fp32, near them in bf16, and training that learns."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_most import platform
from megatron_most.model.core_attention import PortableCoreAttention
from megatron_most.model.packed_row import packed_row
from tests.gpu import hardware
from tests.gpu.comparison import assert_near, relative_error
from tests.gpu.computations import ALL_CHOSEN, MODELS, losses_of_steps, model_step
from tests.unit.model.packed_rows import on_context_ranks

STEPS = 40


def core_attention(head_dim: int, dtype: torch.dtype) -> PortableCoreAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        kv_channels=head_dim,
        params_dtype=dtype,
        cuda_graph_modules=[],
    )
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    return PortableCoreAttention(config, softmax_scale=None, pg_collection=SimpleNamespace(cp=alone))


@pytest.mark.parametrize("name", MODELS)
def test_fp32_is_the_cpus(name: str, on_cpu: Callable[..., Any]) -> None:
    """Only the order of sums differs: routing is the same token by token."""
    assert_near(model_step(MODELS[name]), on_cpu("model", name), logits=1e-4, loss=1e-5, gradients=3e-4)


@pytest.mark.parametrize("name", ["all chosen", "all chosen, packed"])
def test_bf16_is_near_the_cpus_fp32(name: str, on_cpu: Callable[..., Any]) -> None:
    """bf16 has 8 bits of mantissa: four layers of it are 0.8 % off in the logits and 1.1 % in the gradients on a CPU.

    The weights are the same numbers on both sides.
    """
    found = model_step({**MODELS[name], "precision__dtype": "bf16"})
    assert_near(found, on_cpu("model", name), logits=2e-2, loss=2e-3, gradients=3e-2)


@pytest.mark.parametrize("recompute", ["none", "moe_act", "moe", "full"])
def test_a_batch_is_learned_by_heart(recompute: str) -> None:
    """Every loss and gradient norm on the way is finite."""
    losses = losses_of_steps({"training__recompute": recompute}, STEPS, same_batch=True)
    assert losses[-1] < 0.6 * losses[0]


def test_recomputation_changes_no_gradient() -> None:
    plain, again = (
        model_step({**ALL_CHOSEN, "precision__dtype": "bf16", "training__recompute": mode}) for mode in ("none", "full")
    )
    assert_near(again, plain, logits=1e-2, loss=1e-3, gradients=2e-2)  # sums of atomic additions have no order


@pytest.mark.skipif(not hardware.is_ampere(), reason="FlashAttention needs a compute capability of 8.0")
@pytest.mark.parametrize("head_dim", [64, 128, 192])
def test_there_is_a_kernel_for_packed_rows(head_dim: int) -> None:
    """Without it every test of it is skipped, and packed rows take a third more time."""
    assert not platform.why_no_document_attention(head_dim, torch.bfloat16)


@hardware.needs(hardware.DOCUMENTS)
@pytest.mark.parametrize("context_size", [2, 4])
def test_the_kernel_for_packed_rows_on_ranks_that_share_them(context_size: int) -> None:
    """Each rank's chunks, with keys up to their ends, on one GPU; the batches of documents of one rank in fp32."""
    boundaries = torch.tensor([0, 8, 136, 144, 704, 1024], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(1024, 4, size, generator=generator) for size in (192, 192, 128)]
    whole = packed_row(boundaries, device=platform.device())
    rows = [packed_row(boundaries, rank, context_size, platform.device()) for rank in range(context_size)]
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        attention = core_attention(head_dim=192, dtype=dtype)
        inputs = [x.to(platform.device(), torch.bfloat16).to(dtype).requires_grad_() for x in values]
        is_kernel = dtype == torch.bfloat16
        out = (
            on_context_ranks(attention, inputs, rows)
            if is_kernel
            else attention(*inputs, None, packed_seq_params=whole)
        )
        results.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    for wanted, found in zip(*results, strict=True):
        assert relative_error(found, wanted) < 1e-2


@hardware.needs(hardware.DOCUMENTS)
@pytest.mark.parametrize("num_groups", [4, 2])
def test_the_kernel_for_packed_rows_is_the_batches_of_documents(num_groups: int) -> None:
    """With the head sizes of DeepSeek-V2-Lite, outputs and gradients; the batches in fp32."""
    boundaries = torch.tensor([0, 1, 130, 131, 700, 1024], dtype=torch.int32)
    row = packed_row(boundaries, device=platform.device())
    shapes = ((1024, 4, 192), (1024, num_groups, 192), (1024, num_groups, 128))
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.to(platform.device(), torch.bfloat16).to(dtype).requires_grad_() for x in values]
        out = core_attention(head_dim=192, dtype=dtype)(*inputs, None, packed_seq_params=row)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    for wanted, found in zip(*results, strict=True):
        assert relative_error(found, wanted) < 1e-2
