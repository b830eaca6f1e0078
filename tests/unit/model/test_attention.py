"""Attention in one process: the core against a loop over queries, and grouped-query models packed and counted."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_most import parallel
from megatron_most.config import DataConfig
from megatron_most.data.loading.batch import make_batch
from megatron_most.data.storage.documents import Document
from megatron_most.model import build_model, count_parameters
from megatron_most.model.core_attention import PortableCoreAttention
from megatron_most.model.packed_row import packed_row
from megatron_most.training.microbatches import packed_seq_params
from tests.distributed.shards import fill_weights
from tests.distributed.tiny import tiny_batch, tiny_config
from tests.unit.data.tiny import row_of
from tests.unit.model.packed_rows import document_kernel, on_context_ranks

HEADS, HEAD_DIM, VALUE_DIM = 6, 5, 4
GQA = {
    "model__attention__type": "gqa",
    "model__attention__num_query_groups": 2,
    "model__attention__kv_channels": 10,
}


def core(softmax_scale: float | None = None) -> PortableCoreAttention:
    config = TransformerConfig(
        num_layers=1, hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS, cuda_graph_modules=[]
    )
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    return PortableCoreAttention(config, softmax_scale=softmax_scale, pg_collection=SimpleNamespace(cp=alone))


def tensors(seed: int, num_queries: int, num_keys: int, num_groups: int, *batch: int) -> list[torch.Tensor]:
    """Query ``[s, *batch, n, d]``, key ``[k, *batch, g, d]``, value ``[k, *batch, g, v]``."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (num_queries, *batch, HEADS, HEAD_DIM),
        (num_keys, *batch, num_groups, HEAD_DIM),
        (num_keys, *batch, num_groups, VALUE_DIM),
    ]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def one_by_one(query, key, value, scale: float, may_attend) -> torch.Tensor:
    """``[s, n, d]``, ``[k, g, d]``, ``[k, g, v]`` -> ``[s, n * v]``; ``may_attend(i)`` are the keys of query i."""
    share = HEADS // key.shape[1]
    rows = []
    for i, head in itertools.product(range(len(query)), range(HEADS)):
        keys = may_attend(i)
        weights = torch.softmax(key[keys, head // share] @ query[i, head] * scale, dim=0)
        rows.append(weights @ value[keys, head // share])
    return torch.cat(rows).view(len(query), -1)


def assert_same_with_gradients(actual: torch.Tensor, expected: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.autograd.grad(out, inputs, direction) for out in (actual, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [None, document_kernel], ids=["batches", "kernel"])
@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    num_groups=st.sampled_from([1, 2, 3, 6]),
    seed=st.integers(0, 1000),
)
def test_packed_queries_see_what_comes_before_them_in_their_document(kernel, lengths, num_groups, seed):
    ends = [0, *itertools.accumulate(lengths)]
    start_of = [start for start, end in itertools.pairwise(ends) for _ in range(start, end)]
    query, key, value = inputs = tensors(seed, ends[-1], ends[-1], num_groups)
    packed = packed_row(torch.tensor(ends, dtype=torch.int32))
    attention = core(0.3)
    attention.document_kernel = kernel
    actual = attention(query, key, value, None, packed_seq_params=packed)
    expected = one_by_one(query, key, value, 0.3, lambda i: list(range(start_of[i], i + 1)))
    assert_same_with_gradients(actual, expected, inputs)


@pytest.mark.parametrize("kernel", [None, document_kernel], ids=["batches", "kernel"])
@settings(max_examples=25)
@given(
    context_size=st.integers(2, 4),
    chunks=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    num_groups=st.sampled_from([1, 3, 6]),
    seed=st.integers(0, 1000),
)
def test_ranks_that_share_documents_see_what_one_rank_sees(kernel, context_size, chunks, num_groups, seed):
    ends = [0, *itertools.accumulate(2 * context_size * chunk for chunk in chunks)]
    start_of = [start for start, end in itertools.pairwise(ends) for _ in range(start, end)]
    query, key, value = inputs = tensors(seed, ends[-1], ends[-1], num_groups)
    rows = [packed_row(torch.tensor(ends, dtype=torch.int32), rank, context_size) for rank in range(context_size)]
    attention = core(0.3)
    attention.document_kernel = kernel
    actual = on_context_ranks(attention, inputs, rows)
    expected = one_by_one(query, key, value, 0.3, lambda i: list(range(start_of[i], i + 1)))
    assert_same_with_gradients(actual, expected, inputs)
    assert all(("batches" in vars(row)) == (kernel is None) for row in rows)


@pytest.mark.parametrize("value_dim", [128, 192])
def test_torchs_kernel_takes_what_it_is_given(value_dim):
    """Without a device for it there are no numbers, but shapes, and the arguments of the installed torch."""
    sizes = ((4, 192), (2, 192), (2, value_dim))
    query, key, value = (
        torch.zeros(30, *size, dtype=torch.bfloat16, device="meta", requires_grad=True) for size in sizes
    )
    packed = packed_row(torch.tensor([0, 3, 30], dtype=torch.int32), device="meta")
    attention = core()
    attention.document_kernel = torch.ops.aten._flash_attention_forward
    out = attention(query, key, value, None, packed_seq_params=packed)
    assert out.shape == (30, 4 * value_dim)
    out.sum().backward()
    assert [x.grad.shape for x in (query, key, value)] == [x.shape for x in (query, key, value)]


def test_kernels_that_know_documents_are_given_few_lengths_and_no_batches():
    rows = [packed_row(torch.tensor([0, length, 4096], dtype=torch.int32)) for length in range(2048, 4096)]
    assert {(row.max_seqlen_q, row.max_seqlen_kv) for row in rows} == {(2048, 2048), (4096, 4096)}
    assert packed_row(torch.tensor([0, 3000], dtype=torch.int32)).max_seqlen_q == 3000
    row, attention = packed_row(torch.tensor([0, 3, 30], dtype=torch.int32)), core()
    attention.document_kernel = document_kernel
    attention(*tensors(0, 30, 30, 6), None, packed_seq_params=row)
    assert "batches" not in vars(row)


WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::_unique2", "aten::equal"}
"""Operations whose result the host has to know before it can go on."""


@pytest.mark.parametrize("num_groups", [2, 6])
def test_the_host_does_not_wait_for_the_device_on_a_packed_row(num_groups):
    query, key, value = tensors(0, 30, 30, num_groups)
    packed = packed_row(torch.tensor([0, 3, 4, 16, 30], dtype=torch.int32))
    assert packed.batches.documents  # made on the host, by the first layer
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        core()(query, key, value, None, packed_seq_params=packed)
    called = {event.key: event.count for event in profile.key_averages()}
    assert "aten::scaled_dot_product_attention" in called
    assert {name: count for name, count in called.items() if name in WAITS} == {}


@pytest.mark.parametrize("cached", [0, 4])
@pytest.mark.parametrize("num_groups", [1, 2, 6])
def test_queries_are_the_last_of_the_keys_and_the_mask_forbids_more(cached, num_groups):
    num_queries, num_keys = 5, 5 + cached
    query, key, value = inputs = tensors(1, num_queries, num_keys, num_groups, 2)
    forbidden = torch.zeros(2, 1, num_queries, num_keys, dtype=torch.bool)
    forbidden[1, :, 2:, 1] = True
    scale = 1 / math.sqrt(HEAD_DIM)
    for mask in (None, forbidden):
        actual = core()(query, key, value, mask)
        expected = torch.stack(
            [
                one_by_one(
                    query[:, row],
                    key[:, row],
                    value[:, row],
                    scale,
                    lambda i, row=row, mask=mask: [
                        k for k in range(cached + i + 1) if mask is None or not mask[row, 0, i, k]
                    ],
                )
                for row in range(2)
            ],
            dim=1,
        )
        assert_same_with_gradients(actual, expected, inputs)


@pytest.fixture(scope="module")
def process_groups():
    parallel.initialize(tiny_config().parallel, seed=1)
    yield
    parallel.destroy()


@pytest.mark.usefixtures("process_groups")
@pytest.mark.parametrize("norm, has_biases", [("none", False), ("head", True), ("all_heads", False)])
def test_parameter_count_is_the_built_models(norm, has_biases):
    further = {"model__attention__qk_layernorm": norm, "model__attention__add_qkv_bias": has_biases}
    config = tiny_config(**GQA, **further, model__share_embeddings_and_output_weights=has_biases)
    [model] = build_model(config)
    assert count_parameters(config)["total"] == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.usefixtures("process_groups")
def test_llama_3_2_1b_s_attention_is_counted_as_published():
    """2048 wide, 32 heads and 8 key-value heads of 64: 10,485,760 parameters a layer."""
    layers = [
        count_parameters(
            tiny_config(
                model__hidden_size=2048,
                model__num_layers=num_layers,
                model__first_k_dense_replace=1,
                model__attention__type="gqa",
                model__attention__num_attention_heads=32,
                model__attention__num_query_groups=8,
                model__attention__kv_channels=64,
            )
        )["total"]
        for num_layers in (2, 3)
    ]
    experts = 3 * 2048 * (8 * 24 + 32) + 8 * 2048
    assert layers[1] - layers[0] == 10_485_760 + experts + 2 * 2048


@pytest.mark.usefixtures("process_groups")
@pytest.mark.parametrize("attention", [{}, GQA], ids=["mla", "gqa"])
@pytest.mark.parametrize("rope", ["rope", "yarn"])
@pytest.mark.parametrize("kernel", [None, document_kernel], ids=["batches", "kernel"])
def test_packed_and_padded_documents_have_the_losses_they_have_alone(attention, rope, kernel):
    config = tiny_config(
        **attention,
        model__attention__rope__rope_type=rope,
        model__attention__rope__original_max_position_embeddings=4,
        data__seq_length=64,
        data__packing=True,
        data__document_multiple=8,
        training__micro_batch_size=1,
    )
    vocab = config.vocab
    [model] = build_model(config)
    fill_weights([model])
    for layer in model.decoder.layers:
        layer.self_attention.core_attention.document_kernel = kernel
    source = tiny_batch(config, seed=5)
    documents = [
        Document(ids, source.loss_mask[0, start:end].bool().numpy(), coded, source.codes[0, start:end].numpy()[coded])
        for start, end in ((0, 20), (20, 25), (25, 44))
        for ids in [source.ids[0, start:end].numpy()]
        for coded in [np.flatnonzero(vocab.codec_layout.holds_side_codes(ids))]
    ]
    together = make_batch([row_of(documents)], vocab, DataConfig(seq_length=64, document_multiple=8))
    packed = model_losses(model, together)
    for document, start in zip(documents, together.cu_seqlens.tolist(), strict=False):
        length = len(document) - 1
        alone = model_losses(model, make_batch([row_of([document])], vocab, DataConfig(seq_length=length)))
        torch.testing.assert_close(packed[:, start : start + length], alone, rtol=1e-5, atol=1e-5)


def model_losses(model: torch.nn.Module, batch) -> torch.Tensor:
    return model(
        batch.ids,
        batch.modality,
        batch.is_padding,
        codes=batch.codes,
        targets=batch.targets(),
        packed_seq_params=packed_seq_params(batch),
    )
