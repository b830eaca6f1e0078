"""Packing: every document in one row, no row too full, few positions wasted."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_most.data.packing import OPEN_ROWS, pack, padded_length


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=300))
def test_rows_hold_every_document_and_never_too_much(lengths):
    row_of, order = pack(np.array(lengths), 50)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert (np.diff(row_of[order]) >= 0).all()
    assert set(row_of.tolist()) == set(range(row_of.max() + 1))
    assert np.bincount(row_of, weights=lengths).max() <= 50


def test_the_fullest_row_that_fits_is_chosen():
    row_of, _ = pack(np.array([7, 5, 3, 4]), 10)
    assert row_of.tolist() == [0, 1, 0, 1]


def test_short_documents_waste_little():
    lengths = np.random.default_rng(0).integers(20, 200, 20000)
    row_of, _ = pack(lengths, 2048)
    assert lengths.sum() / ((row_of.max() + 1) * 2048) > 0.99


def test_rows_close_when_too_many_are_open():
    big = np.full(OPEN_ROWS + 5, 6)
    row_of, _ = pack(np.concatenate([big, np.full(len(big), 4)]), 10)
    # The first five rows were closed before the small documents came, which open three rows of their own.
    assert (np.bincount(row_of)[:5] == 1).all() and row_of.max() + 1 == len(big) + 3


@given(length=st.integers(0, 1000), multiple=st.integers(1, 64))
def test_a_padded_length_is_the_next_multiple(length, multiple):
    padded = padded_length(length, multiple)
    assert padded % multiple == 0 and length <= padded < length + multiple
