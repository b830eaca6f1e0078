"""Positions of a context-parallel rank, compared with chunks cut one by one."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_most.parallel import zigzag_positions, zigzag_positions_packed


def positions_of(start: int, length: int, rank: int, size: int) -> list[int]:
    chunk = length // (2 * size)
    first, second = start + rank * chunk, start + (2 * size - 1 - rank) * chunk
    return [*range(first, first + chunk), *range(second, second + chunk)]


@given(size=st.sampled_from([1, 2, 3, 4]), chunks=st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_each_rank_holds_the_front_and_back_chunk_of_every_document(size, chunks):
    boundaries = list(itertools.accumulate((2 * size * chunk for chunk in chunks), initial=0))
    held = []
    for rank in range(size):
        expected = [
            position
            for start, end in itertools.pairwise(boundaries)
            for position in positions_of(start, end - start, rank, size)
        ]
        assert zigzag_positions_packed(torch.tensor(boundaries, dtype=torch.int32), rank, size).tolist() == expected
        held += expected
    assert sorted(held) == list(range(boundaries[-1]))
    assert zigzag_positions(boundaries[1], size - 1, size).tolist() == positions_of(0, boundaries[1], size - 1, size)


def test_one_rank_holds_documents_of_any_length():
    assert zigzag_positions_packed(torch.tensor([0, 3, 8]), 0, 1).tolist() == list(range(8))


def test_a_document_that_cannot_be_shared_out_is_not_cut_wrongly():
    with pytest.raises(AssertionError, match="evenly"):
        zigzag_positions_packed(torch.tensor([0, 4, 10]), 0, 2)
