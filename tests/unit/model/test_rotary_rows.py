"""Rotations are made once for all layers, start anew with each document, and are Megatron's."""

from __future__ import annotations

import collections
import dataclasses

import pytest
import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_most import parallel
from megatron_most.model import KeyValueCache, MoSTModel, build_model
from megatron_most.model.packed_row import PackedRow, packed_row
from tests.distributed.tiny import tiny_batch, tiny_config

LENGTHS = [5, 17, 1, 64, 41]
GQA = {"model__attention__type": "gqa", "model__attention__num_query_groups": 2, "model__attention__kv_channels": 12}


def row_of(lengths: list[int]) -> PackedRow:
    return packed_row(torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32))


def build(**overrides: object) -> MoSTModel:
    packed = {"data__packing": True, "training__micro_batch_size": 1, "data__seq_length": 128}
    config = tiny_config(**{**packed, **overrides})
    parallel.initialize(config.parallel, seed=1)
    [model] = build_model(config)
    return model


def attend(model: MoSTModel, row: PackedRow | None, forward=None, angles=None, rows: int = 1) -> list[torch.Tensor]:
    """The output of a layer's attention, or of ``forward`` in its place, and the gradients of its input and weights."""
    attention = model.decoder.layers[1].self_attention
    tokens = torch.randn(128, rows, 32, generator=torch.Generator().manual_seed(0))
    inputs = [tokens.requires_grad_(), *attention.parameters()]
    if forward is None:
        output = attention(tokens, None, packed_seq_params=row, rotary_pos_emb=model.rotary(128, row))[0]
    else:
        if row is not None:
            # Of lengths rounded up to the whole row, Megatron's positions would not start anew with each document.
            longest = int(row.boundaries.diff().max())
            row = dataclasses.replace(row, max_seqlen_q=longest, max_seqlen_kv=longest)
        output = forward(attention, tokens, None, packed_seq_params=row, rotary_pos_emb=angles)[0]
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return [output, *torch.autograd.grad(output, inputs, direction)]


@pytest.mark.parametrize("lengths", [LENGTHS, [128], None], ids=["documents", "one", "rows"])
@pytest.mark.parametrize("rope", ["rope", "yarn"])
@pytest.mark.parametrize("q_lora_rank", ["null", 20])
def test_latent_attention_is_megatrons(rope, lengths, q_lora_rank) -> None:
    model = build(
        model__attention__rope__rope_type=rope,
        model__attention__rope__original_max_position_embeddings=16,
        model__attention__rope__mscale=0.7,
        model__attention__q_lora_rank=q_lora_rank,
    )
    row, rows = (None, 2) if lengths is None else (row_of(lengths), 1)
    ours = attend(model, row, rows=rows)
    model.decoder.layers[1].self_attention.rotary_pos_emb = model.rotary.embedding
    torch.testing.assert_close(ours, attend(model, row, MLASelfAttention.forward, rows=rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lengths", [LENGTHS, None], ids=["documents", "rows"])
@pytest.mark.parametrize("rope", ["rope", "yarn", "llama3"])
def test_grouped_query_attention_is_megatrons(rope, lengths) -> None:
    model = build(
        **GQA, model__attention__rope__rope_type=rope, model__attention__rope__original_max_position_embeddings=16
    )
    row, rows = (None, 2) if lengths is None else (row_of(lengths), 1)
    angles = model.rotary.embedding.get_emb(128 if lengths is None else max(lengths))
    theirs = attend(model, row, SelfAttention.forward, angles, rows)
    torch.testing.assert_close(attend(model, row, rows=rows), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", [{}, GQA], ids=["mla", "gqa"])
def test_positions_start_anew_with_each_document(attention) -> None:
    """Logits would not tell, for they see differences of positions, but exactness and YaRN's range would suffer."""
    rotary = build(**attention).rotary
    assert torch.equal(rotary(128, row_of(LENGTHS)), torch.cat([rotary(length) for length in LENGTHS]))


@pytest.mark.parametrize("attention", [{}, GQA], ids=["mla", "gqa"])
def test_positions_follow_what_is_cached_and_may_be_more_than_the_model_was_made_for(attention) -> None:
    rotary = build(**attention).rotary
    cache = KeyValueCache(num_rows=1, num_positions=300)
    assert torch.equal(rotary(3, None, cache), rotary(3))
    cache.start_decoding(torch.tensor([200]))
    assert torch.equal(rotary(1, None, cache), rotary(300)[200:201])


class Operators(TorchDispatchMode):
    """Counts what would be launched: not views, and not numbers read from the host's boundaries."""

    _FREE = ("slice", "split", "view", "squeeze", "select", "expand", "transpose", "permute", "detach", "_local_scalar")

    def __init__(self) -> None:
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.").split(".")[0]
        plain = name.removeprefix("_unsafe_").removeprefix("un")
        if not plain.startswith(self._FREE) and name not in ("t", "alias", "empty", "_conj", "_reshape_alias"):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention", [{}, GQA], ids=["mla", "gqa"])
def test_more_documents_are_no_more_operators(attention) -> None:
    model = build(**attention)
    counts = []
    for number in (2, 32):
        row = row_of([128 // number] * number)
        assert len(row.batches.documents) == 1
        with Operators() as operators:
            attend(model, row)
        counts.append(operators.counts)
    assert counts[0] == counts[1]


MOST_OPERATORS = {("mla", "documents"): 60, ("mla", "rows"): 46, ("gqa", "documents"): 34, ("gqa", "rows"): 20}
"""Of one layer's attention, forward and backward; documents of one length, in a kernel that knows none."""


@pytest.mark.parametrize("form", ["documents", "rows"])
@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_attention_stays_within_its_operators(attention, form) -> None:
    model = build(**(GQA if attention == "gqa" else {"model__attention__rope__rope_type": "yarn"}))
    row = row_of([32, 32, 32, 32]) if form == "documents" else None
    attend(model, row)
    with Operators() as operators:
        attend(model, row)
    made_by_the_test = 2
    assert operators.counts.total() - made_by_the_test <= MOST_OPERATORS[attention, form]


@pytest.mark.parametrize("attention", [{}, GQA], ids=["mla", "gqa"])
def test_no_layer_makes_rotations(attention) -> None:
    config = tiny_config(data__packing=True, training__micro_batch_size=1, data__seq_length=128, **attention)
    parallel.initialize(config.parallel, seed=1)
    [model] = build_model(config)
    batch = tiny_batch(config, seed=0)
    for row in (row_of(LENGTHS), None):
        with Operators() as operators:
            model(batch.ids, batch.modality, batch.is_padding, codes=batch.codes, packed_seq_params=row)
        assert not {"cos", "sin", "polar", "outer"} & set(operators.counts)
