"""Geometry of the curves: where values land, which scale is used, how long runs are thinned."""

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from megatron_most.report.charts import (
    HEIGHT,
    LEFT,
    MAX_POINTS,
    WIDTH,
    Series,
    average_points,
    figures,
    format_number,
    line_chart,
    nice_ticks,
)


def chart_of(*values, **options):
    return line_chart("t", [Series("a", list(enumerate(values)), 0)], **options)


def test_points_lie_where_their_values_say():
    chart = chart_of(0.0, 5.0, 10.0)
    (curve,) = chart.curves
    xs, ys = [point[2] for point in curve.points], [point[3] for point in curve.points]
    assert xs == pytest.approx([chart.left, (chart.left + chart.right) / 2, chart.right])
    assert ys == pytest.approx([chart.bottom, (chart.top + chart.bottom) / 2, chart.top])
    assert curve.path == "M" + "L".join(f"{x:g} {y:g}" for x, y in zip(xs, ys, strict=True))


def test_a_wide_span_gets_a_logarithmic_scale():
    chart = chart_of(0.001, 0.1, 10.0)
    ys = [point[3] for point in chart.curves[0].points]
    assert chart.is_log
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)
    assert not chart_of(1.0, 20.0).is_log
    assert not chart_of(0.0, 100.0).is_log
    assert not chart_of(0.001, 10.0, from_zero=True).is_log


def test_an_axis_from_zero_starts_there():
    assert chart_of(5000.0, 5100.0, from_zero=True).y_ticks[0] == (HEIGHT - 32.0, "0")
    assert chart_of(5000.0, 5100.0).y_ticks[0][1] == "5000"


@given(
    st.lists(st.tuples(st.integers(0, 10**7), st.floats(-1e30, 1e30, allow_nan=False)), min_size=1, max_size=40),
    st.booleans(),
)
@example([(0, 1.0), (1, 2.225073858507e-311)], False)
@example([(0, 8e20), (1, 5e-288)], False)
def test_any_values_stay_inside_the_chart(points, from_zero):
    assert_inside(points, from_zero)


@given(
    st.lists(
        st.tuples(st.integers(0, 10**7), st.floats(0, exclude_min=True, allow_infinity=False)), min_size=1, max_size=40
    )
)
@example([(0, 5e-324), (1, 1.7e308)])
def test_a_logarithmic_axis_takes_any_positive_values(points):
    values = dict(points).values()
    assume(min(values) < max(values) / 1e3)
    assert_inside(points, from_zero=False)


def assert_inside(points, from_zero):
    chart = line_chart("t", [Series("a", sorted(dict(points).items()), 0)], from_zero=from_zero)
    for _, _, x, y in chart.curves[0].points:
        assert LEFT - 0.1 <= x <= WIDTH
        assert chart.top - 0.1 <= y <= chart.bottom + 0.1
    assert all(chart.top - 0.1 <= y <= chart.bottom + 0.1 for y, _ in chart.y_ticks)


def test_a_long_run_is_thinned_to_means_and_says_so():
    points = [(step, float(step % 2)) for step in range(10 * MAX_POINTS)]
    thinned = average_points(points, MAX_POINTS)
    assert len(thinned) == MAX_POINTS
    assert thinned[0] == (9, 0.5)
    assert thinned[-1][0] == points[-1][0]
    assert line_chart("t", [Series("a", points, 0)]).averaged == 10
    assert average_points(points[:5], MAX_POINTS) == points[:5]


def test_markers_are_for_few_points():
    few = line_chart("t", [Series("a", [(1, 1.0), (2, 2.0)], 0, marker="square")])
    many = line_chart("t", [Series("a", [(step, 1.0) for step in range(100)], 0, marker="square")])
    alone = chart_of(3.0)
    assert [few.curves[0].marker, many.curves[0].marker, alone.curves[0].marker] == ["square", "", "circle"]


def test_a_chart_without_points_is_none_and_empty_series_are_left_out():
    assert line_chart("t", [Series("a", [], 0)]) is None
    chart = line_chart("t", [Series("a", [], 0), Series("b", [(1, 2.0)], 1)])
    assert [curve.series.label for curve in chart.curves] == ["b"]


def test_the_description_says_it_in_words():
    assert chart_of(4.0, 0.25).description == "t: a from 4 at step 0 to 0.25 at step 1"
    assert chart_of(4.0).description == "t: a 4 at step 0"
    [by_both] = figures([chart_of(4.0, 0.25)], [line_chart("t", [Series("a", [(0, 4.0), (2.5e6, 0.25)], 0)])])
    assert by_both.views[1].description == "t: a from 4 at 0 tokens to 0.25 at 2.5M tokens"
    assert by_both.views[1].x_ticks[-1][1] == "2.5M"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1.0, "1"),
        (0.0015, "0.0015"),
        (1.234e-5, "1.23e-5"),
        (3e-6, "3e-6"),
        (-2.5, "-2.5"),
        (1234.5, "1234"),
        (9000, "9000"),
        (12345, "12.3k"),
        (123456, "123k"),
        (4512345, "4.51M"),
        (1.57e10, "15.7G"),
        (9.89e14, "989T"),
    ],
)
def test_numbers_are_short(value, text):
    assert format_number(value) == text


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 8))
def test_ticks_enclose_their_range_and_are_few(low, span, count):
    ticks = nice_ticks(low, low + span, count)
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + step * 1e-6
    assert ticks[-1] >= low + span - step * 1e-6
    assert 2 <= len(ticks) <= 2 * count + 3
