"""The hash that compares copies of a weight, and how differences are told."""

from __future__ import annotations

import pytest
import torch

from megatron_most.training.replicas import Difference, weight_hash


@pytest.fixture(scope="module")
def keys() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-(2**62), 2**62, (2, 32), generator=generator) | 1


def flipped(tensor: torch.Tensor, places: list[int], bit: int) -> torch.Tensor:
    """A copy of ``tensor`` with a bit of some of its bytes flipped."""
    raw = tensor.flatten().view(torch.uint8).clone()
    raw[places] ^= 1 << bit
    return raw.view(tensor.dtype).view(tensor.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int64])
def test_every_flipped_bit_changes_the_hash(dtype: torch.dtype, keys: torch.Tensor) -> None:
    """Also in a tensor of more words than there are keys, whose blocks are hashed."""
    tensor = torch.randn(3, 7).to(dtype)
    hashes = [weight_hash(tensor, keys)]
    hashes += [
        weight_hash(flipped(tensor, [place], bit), keys)
        for place in range(tensor.numel() * tensor.element_size())
        for bit in range(8)
    ]
    assert len({value.item() for value in hashes}) == len(hashes)


@pytest.mark.parametrize("bit", range(8))
def test_a_stuck_bit_changes_the_hash(bit: int, keys: torch.Tensor) -> None:
    """The same bit of several values: in a plain sum or XOR, changes of an even number of them cancel."""
    tensor = torch.zeros(20)
    for last_byte in ([3, 7], [3, 35], [3, 7, 11, 15], [3, 7, 67, 71]):
        assert weight_hash(flipped(tensor, last_byte, bit), keys) != weight_hash(tensor, keys)


def test_values_in_another_order_have_another_hash(keys: torch.Tensor) -> None:
    tensor = torch.arange(24.0)
    hashes = {weight_hash(tensor.roll(shift), keys).item() for shift in range(24)}
    assert len(hashes) == 24


def test_not_a_number_equals_itself(keys: torch.Tensor) -> None:
    assert weight_hash(torch.tensor([float("nan"), 0.0]), keys) == weight_hash(torch.tensor([float("nan"), 0.0]), keys)
    assert weight_hash(torch.tensor([0.0]), keys) != weight_hash(torch.tensor([-0.0]), keys)


def test_a_majority_says_which_rank_is_wrong() -> None:
    hosts = ["a", "a", "b", "b"]
    assert Difference("w", {0: 5, 1: 5, 3: 6}).describe(hosts) == "w on rank 3 (b) differs from the 2 other copies"
    assert Difference("w", {0: 5, 2: 6}).describe(hosts) == "w differs between ranks 0 (a) and 2 (b)"
    two = Difference("w", {0: 7, 1: 5, 2: 6, 3: 5})
    assert two.describe(hosts) == "w differs between ranks 0 (a), 1 (a), 2 (b) and 3 (b)"
