"""Kernels of torch are taken where they work, and nowhere else."""

from __future__ import annotations

import functools

import pytest
import torch

from megatron_most.platform import attention
from tests.unit.model.packed_rows import document_kernel


@pytest.fixture(autouse=True)
def forget():
    yield
    attention.why_no_document_attention.cache_clear()


def test_without_a_gpu_no_kernel_knows_documents():
    assert attention.document_attention(128, torch.bfloat16) is None


def test_a_kernel_that_fails_when_it_is_tried_is_not_taken(monkeypatch: pytest.MonkeyPatch):
    """As in builds of torch without FlashAttention: here it has no kernel for the CPU."""
    attention.why_no_document_attention.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention, "device", lambda: torch.device("cpu"))
    assert attention.document_attention(128, torch.bfloat16) is None
    assert attention.document_attention(128, torch.float32) is None


@pytest.mark.parametrize("aligns_ends", [True, False])
def test_a_kernel_is_taken_only_if_the_last_query_sees_all_keys(aligns_ends: bool, monkeypatch: pytest.MonkeyPatch):
    """Ranks that share a document give it fewer queries than keys."""
    kernel = functools.partial(document_kernel, aligns_ends=aligns_ends)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", kernel)
    assert attention.document_attention(128, torch.bfloat16) is (kernel if aligns_ends else None)


def test_values_are_filled_up_where_a_fused_kernel_wants_it():
    """torch's kernel for the CPU does; without it, logits of all pairs of positions would be kept."""
    assert attention.wants_equal_head_sizes(192, 128, torch.float32)
    assert not attention.wants_equal_head_sizes(128, 128, torch.float32)
    assert not attention.wants_equal_head_sizes(64, 128, torch.float32)
