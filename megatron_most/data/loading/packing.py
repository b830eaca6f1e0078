"""Which documents share a row."""

from __future__ import annotations

import bisect

import numpy as np

OPEN_ROWS = 128
"""Rows that may still take a document; more waste fewer positions but take longer to search."""


def padded_length[Length: (int, np.ndarray)](length: Length, multiple: int) -> Length:
    """Positions that a packed document takes: ``length`` rounded up to a multiple of ``multiple``."""
    return -(-length // multiple) * multiple


def pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit packing of documents into rows, in the given order, with at most ``OPEN_ROWS`` open rows.

    Args:
        lengths: ``[n]`` positions of each document, none above ``capacity``.
        capacity: positions of a row.

    Returns:
        ``row_of``: ``[n]`` the row of each document; rows are numbered from 0 without gaps.
        ``order``: ``[n]`` the documents sorted by row, and by their given order inside a row.
    """
    row_of = np.empty(len(lengths), dtype=np.int64)
    open_rows: list[tuple[int, int]] = []  # (positions left, row), ascending
    num_rows = 0
    for index, length in enumerate(lengths.tolist()):
        place = bisect.bisect_left(open_rows, (length, -1))
        if place < len(open_rows):
            left, row = open_rows.pop(place)
        else:
            left, row = capacity, num_rows
            num_rows += 1
            if len(open_rows) == OPEN_ROWS:
                del open_rows[0]  # the fullest
        row_of[index] = row
        if left > length:
            bisect.insort(open_rows, (left - length, row))
    return row_of, np.argsort(row_of, kind="stable")
