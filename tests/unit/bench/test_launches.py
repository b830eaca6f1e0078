"""The counter of operators counts what it says, and no part of a step starts more of them than it has."""

from __future__ import annotations

import collections
from collections.abc import Iterator

import pytest
import torch

from megatron_most import parallel
from megatron_most.config.load import build_config
from megatron_most.errors import ConfigError
from tools.bench import launches
from tools.bench.counting import LIST_COPY, Count, Counting
from tools.bench.rows import TARGET_SHARE, packed_documents

BUDGETS = {
    "attention": (17, 38, 0),
    "attention, packed": (36, 79, 0),  # in batches of documents; torch's kernel on a GPU takes fewer
    "router": (24, 14, 0),
    "dispatch": (12, 3, 0),
    "experts": (11, 30, 0),
    "shared expert": (5, 11, 0),
    "MoE layer": (53, 58, 0),
    "layer": (84, 127, 0),
    "layer, packed": (103, 168, 0),
    "dense feed-forward": (5, 11, 0),
    "embeddings": (10, 4, 0),
    "heads and losses": (46, 29, 0),
    "loss": (30, 6, 0),
    "packed row": (14, 0, 3),  # on the host
    "optimizer": (72, 0, 1),
    "micro-batch": (704, 0, 2),
    "micro-batch, packed": (885, 0, 2),
    "step": (782, 0, 3),
    "step, packed": (963, 0, 3),
    "decode token": (154, 0, 0),
}
"""What each part costs by now. A change that lowers a count lowers its budget, too."""


@pytest.fixture(scope="module")
def counts() -> Iterator[dict[str, tuple[Count, Count | None]]]:
    config = build_config("bench", launches.CONFIG)
    parallel.initialize(config.parallel, config.seed)
    yield launches.count_parts(launches.Bench(config), [*launches.PARTS, launches.DECODE])
    parallel.destroy()


@pytest.mark.parametrize("part", BUDGETS)
def test_no_part_exceeds_its_budget(counts, part: str) -> None:
    forward, backward = counts[part]
    found = [forward] if backward is None else [forward, backward]
    operators = [count.num_operators for count in found]
    waits = sum((count.waits for count in found), start=collections.Counter())
    *budget, allowed_waits = BUDGETS[part]
    listed = [dict(count.operators.most_common(12)) for count in found]
    assert all(number <= most for number, most in zip(operators, budget, strict=False)), (operators, budget, listed)
    assert waits.total() <= allowed_waits, waits


def test_every_part_that_is_ours_has_a_budget() -> None:
    theirs = {name for name in launches.PARTS if "Megatron's" in name}
    assert {*launches.PARTS, launches.DECODE} - theirs == BUDGETS.keys()


def test_the_table_has_a_line_for_each_part(counts) -> None:
    lines = launches.table(counts, with_operators=False).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name}" for name in counts]
    router = lines[2 + list(counts).index("router")].split(" | ")
    forward, backward = counts["router"]
    assert router[1:3] == [str(forward.num_operators), str(backward.num_operators)]
    assert "router, forward, operators: " in launches.table(counts, with_operators=True)


def test_operators_are_counted_and_views_are_not() -> None:
    x, y = torch.randn(4, 6), torch.randn(6, 8)
    with Counting() as count:
        (x @ y).view(2, 2, 8).transpose(0, 1)[0].exp_()
        torch.empty(3)
    assert count.operators == {"mm": 1, "exp_": 1}
    assert count.flops == 2 * 4 * 6 * 8
    assert count.bytes == 4 * (24 + 48 + 32) + 4 * 16
    assert not count.waits


def test_a_backward_pass_is_counted() -> None:
    x = torch.randn(5, requires_grad=True)
    y, gradient = x.sin(), torch.ones(5)
    with Counting() as count:
        y.backward(gradient)
    assert count.operators == {"cos": 1, "mul": 1}


def test_what_makes_the_host_wait_is_named() -> None:
    x = torch.tensor([1.0, 0.0, 2.0])
    with Counting() as count:
        x.nonzero()
        x.masked_select(x > 0)
        x.sum().item()
        x.new_tensor([1.0])
        torch.tensor([1.0], device=x.device)
        torch.tensor([1.0]).to(x.device)
    assert count.waits == {"nonzero": 1, "masked_select": 1, "_local_scalar_dense": 1, LIST_COPY: 3}


def test_pinned_and_host_lists_make_nobody_wait() -> None:
    with Counting() as count:
        torch.tensor([1, 2]).to("cpu", non_blocking=True)
        torch.tensor([1, 2]).cumsum(0)
    assert not count.waits


def test_grouped_products_count_as_one_product_of_their_rows() -> None:
    x, weight = torch.randn(6, 16), torch.randn(2, 16, 8)
    with Counting() as count:
        torch.nn.functional.grouped_mm(x, weight, offs=torch.tensor([2, 6], dtype=torch.int32))
    assert count.flops == 2 * 6 * 16 * 8


def test_an_unknown_part_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="--part rooter: no such part; parts are attention, "):
        launches.bench_launches(launches.make_parser().parse_args(["--part", "rooter"]))


def test_the_packed_row_is_full_and_has_its_share_of_targets() -> None:
    config = build_config("bench", launches.CONFIG, ["data.seq_length=4096"])
    batch = packed_documents(config, 32)
    assert not batch.is_padding.any() and batch.cu_seqlens[-1] == 4096 and len(batch.cu_seqlens) == 33
    assert batch.loss_mask.mean().item() == pytest.approx(TARGET_SHARE, abs=0.02)
    assert (batch.modality > 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert ((batch.code_labels >= 0).any(-1) <= (batch.loss_mask > 0)).all()
