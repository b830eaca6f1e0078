"""Intervals and paired differences against values from a table and a calculation by hand."""

from __future__ import annotations

import math

import pytest

from megatron_most.sweep.intervals import estimate, paired_difference


def test_interval_of_three():
    found = estimate([1.0, 2.0, 6.0])
    # mean 3, deviation sqrt(7), Student's t with 2 degrees of freedom at 97.5 %: 4.3027
    assert (found.mean, found.count) == (3.0, 3)
    assert found.half_width == pytest.approx(4.3027 * math.sqrt(7 / 3), rel=1e-4)
    assert not found.is_beyond_noise


def test_one_value_has_no_interval_and_none_no_mean():
    assert estimate([2.0]).half_width == math.inf and not estimate([2.0]).is_beyond_noise
    assert estimate([]) is None


def test_pairs_take_out_what_seeds_have_in_common():
    baseline = {1: 10.0, 2: 20.0, 3: 30.0, 4: 99.0}
    found = paired_difference({1: 11.0, 2: 21.1, 3: 30.9, 5: 0.0}, baseline)
    assert found.count == 3 and found.mean == pytest.approx(1.0)
    assert found.is_beyond_noise  # although each mean's interval spans more than 20
    assert paired_difference({7: 1.0}, baseline) is None
