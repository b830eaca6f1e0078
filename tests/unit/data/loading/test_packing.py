"""Packing: every document in one row, no row too full, few positions wasted."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_most.data.loading.packing import OPEN_ROWS, pack, padded_length


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=300))
def test_rows_hold_every_document_and_never_too_much(lengths):
    row_of, order = pack(np.array(lengths), 50)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert (np.diff(row_of[order]) >= 0).all()
    assert set(row_of.tolist()) == set(range(row_of.max() + 1))
    assert np.bincount(row_of, weights=lengths).max() <= 50
    # In a row they keep their given order, with every machine's way of sorting.
    assert order.tolist() == sorted(range(len(lengths)), key=lambda document: (row_of[document], document))


def test_the_fullest_row_that_fits_is_chosen():
    row_of, _ = pack(np.array([7, 5, 3, 4]), 10)
    assert row_of.tolist() == [0, 1, 0, 1]


def test_a_row_stays_open_while_a_position_is_left():
    assert pack(np.array([9, 1]), 10)[0].tolist() == [0, 0]


def realistic_lengths(kind: str, num_documents: int = 20_000) -> np.ndarray:
    """Positions per document: read speech of 2 to 30 s, or web texts (log-normal), at most a row."""
    random = np.random.default_rng(0)
    if kind == "text":
        return np.clip(random.lognormal(6.0, 1.1, num_documents), 20, 4096).astype(int)
    seconds = np.clip(random.lognormal(2.4, 0.6, num_documents), 2, 30)
    frames_per_second, codebooks = (12.5, 1) if kind == "frame" else (21.5, 8)
    return (np.ceil(seconds * frames_per_second) * codebooks + 3.3 * seconds + 6).astype(int)


@pytest.mark.parametrize("capacity", [4096, 8192])
@pytest.mark.parametrize("kind", ["frame", "flat", "text"])
def test_little_is_wasted_on_realistic_lengths(kind, capacity):
    lengths = realistic_lengths(kind)
    lengths = lengths[lengths <= capacity]
    row_of, _ = pack(lengths, capacity)
    waste = 1 - lengths.sum() / ((row_of.max() + 1) * capacity)
    alone = 1 - lengths.mean() / capacity
    assert waste < 0.05 and alone > 0.4


def test_rows_close_when_too_many_are_open():
    big = np.full(OPEN_ROWS + 5, 6)
    row_of, _ = pack(np.concatenate([big, np.full(len(big), 4)]), 10)
    # The first five rows were closed before the small documents came; these open three new rows.
    assert (np.bincount(row_of)[:5] == 1).all() and row_of.max() + 1 == len(big) + 3


@given(length=st.integers(0, 1000), multiple=st.integers(1, 64))
def test_a_padded_length_is_the_next_multiple(length, multiple):
    padded = padded_length(length, multiple)
    assert padded % multiple == 0 and length <= padded < length + multiple
