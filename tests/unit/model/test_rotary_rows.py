"""A packed row is rotated at once, and to the bit as Megatron rotates its documents one by one."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_most import parallel
from megatron_most.model import MoSTModel, build_model
from megatron_most.model.packed_row import PackedRow, packed_row
from megatron_most.model.specs import MultiLatentAttention
from tests.distributed.tiny import tiny_config

LENGTHS = [5, 17, 1, 64, 41]
GQA = {"model__attention__type": "gqa", "model__attention__num_query_groups": 2, "model__attention__kv_channels": 12}


def row_of(lengths: list[int]) -> PackedRow:
    return packed_row(torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32))


def build(**overrides: object) -> MoSTModel:
    config = tiny_config(**{"data__packing": True, "training__micro_batch_size": 1, **overrides})
    parallel.initialize(config.parallel, seed=1)
    [model] = build_model(config)
    return model


def attend(model: MoSTModel, row: PackedRow, angles: torch.Tensor | None) -> list[torch.Tensor]:
    """The output of a layer's attention, and the gradients of its input and weights."""
    attention = model.decoder.layers[1].self_attention
    tokens = torch.randn(int(row.cu_seqlens_q[-1]), 1, 32, generator=torch.Generator().manual_seed(0))
    inputs = [tokens.requires_grad_(), *attention.parameters()]
    output = attention(tokens, None, packed_seq_params=row, rotary_pos_emb=angles)[0]
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return [output, *torch.autograd.grad(output, inputs, direction)]


@pytest.mark.parametrize("lengths", [LENGTHS, [128]], ids=["documents", "one"])
@pytest.mark.parametrize("rope", ["rope", "yarn"])
def test_latent_attention_is_megatrons(rope, lengths, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(model__attention__rope__rope_type=rope, model__attention__rope__original_max_position_embeddings=16)
    row = row_of(lengths)
    ours = attend(model, row, None)
    monkeypatch.setattr(
        MultiLatentAttention, "get_query_key_value_tensors", MLASelfAttention.get_query_key_value_tensors
    )
    attention = model.decoder.layers[1].self_attention
    attention.rotary_pos_emb = attention.rotary_pos_emb.embedding
    for mine, theirs in zip(ours, attend(model, row, None), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("rope", ["rope", "yarn", "llama3"])
def test_grouped_query_attention_is_megatrons(rope) -> None:
    model = build(
        **GQA, model__attention__rope__rope_type=rope, model__attention__rope__original_max_position_embeddings=16
    )
    row = row_of(LENGTHS)
    ours = attend(model, row, model._angles(128, row, None))
    of_longest_document = model.rotary(row.max_seqlen_q, packed_seq=True)
    for mine, theirs in zip(ours, attend(model, row, of_longest_document), strict=True):
        assert torch.equal(mine, theirs)


class Operators(TorchDispatchMode):
    """Counts what would be launched: not views, and not numbers read from the host's boundaries."""

    _FREE = ("slice", "split", "view", "squeeze", "select", "expand", "transpose", "permute", "_local_scalar", "t.")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.").removeprefix("_unsafe_").removeprefix("un")
        self.count += not name.startswith(self._FREE)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention", [{}, GQA], ids=["mla", "gqa"])
def test_more_documents_are_no_more_operators(attention) -> None:
    model = build(**attention)
    counts = []
    for number in (2, 32):
        row = row_of([128 // number] * number)
        with Operators() as operators:
            attend(model, row, model._angles(128, row, None))
        counts.append(operators.count)
    assert counts[0] == counts[1]
