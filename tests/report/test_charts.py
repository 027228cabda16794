"""Axes, colours and thinning."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxsparse_triton.report.charts import (
    SCALE,
    Bar,
    Bars,
    HeatMap,
    bar_range,
    fraction,
    heat_color,
    heat_range,
    log_ticks,
    nice_ticks,
    running_mean,
    step_ticks,
    thinned,
    tick_text,
)
from proxsparse_triton.report.grid import grid

numbers = st.floats(-1e6, 1e6, allow_nan=False)


@given(numbers, numbers)
def test_ticks_cover_the_values(first: float, second: float) -> None:
    low, high = min(first, second), max(first, second)
    ticks = nice_ticks(low, high)
    room = 1e-6 * max(abs(low), abs(high), 1e-6)
    assert ticks[0] <= low + room
    assert ticks[-1] >= high - room
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.5, 1]),
        (1.14, 8.1, [0, 2, 4, 6, 8, 10]),
        (0, 1e-4, [0, 5e-5, 1e-4]),
        (2, 2, [1.8, 1.9, 2.0, 2.1, 2.2]),
        (0, 0, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(expected)


def test_ticks_of_steps_are_whole_and_inside() -> None:
    assert step_ticks(1, 400) == [100, 200, 300, 400]
    assert step_ticks(1, 3) == [1, 2, 3]
    assert step_ticks(0.4, 0.6) == [0.4]


def test_logarithmic_ticks() -> None:
    assert log_ticks(10.6, 1834) == [20, 50, 100, 200, 500, 1000]
    assert log_ticks(1, 1e7) == [10.0**power for power in range(8)]


@pytest.mark.parametrize(
    ("value", "percent", "text"),
    [(0.5, True, "50 %"), (1e-4, False, "1e-4"), (2e6, False, "2e6"), (0, False, "0"), (1000, False, "1,000"), (0.001, False, "0.001")],
)
def test_tick_text(value: float, percent: bool, text: str) -> None:
    assert tick_text(value, percent=percent) == text


def test_places_on_an_axis() -> None:
    assert fraction(5, 0, 20) == 0.25
    assert fraction(10, 1, 100, log=True) == pytest.approx(0.5)


def test_bars_begin_at_zero_or_at_the_level() -> None:
    bars = (Bar("a", 20.0, ""), Bar("b", 50.0, ""))
    assert bar_range(Bars("n", "", "", "", bars, ("dense", 10.0))) == (0, 50)
    assert bar_range(Bars("n", "", "", "", bars, ("dense", 10.0), log=True)) == (10, 50)


def heat(*values: float, percent: bool = True) -> HeatMap:
    return HeatMap("n", "", "", "", "", grid({f"layers.{index}.q": value for index, value in enumerate(values)}), percent)


def test_the_colour_scale_has_round_ends_around_the_values() -> None:
    assert heat_range(heat(0.614, 0.951)) == pytest.approx((0.6, 1.0))
    assert heat_range(heat(0.999, 1.0)) == pytest.approx((0.9988, 1.0), abs=3e-4)
    assert heat_range(heat(0.01, 2.3, percent=False)) == (0, 2.5)
    for alone in (0.0, 0.5, 1.0):
        low, high = heat_range(heat(alone))
        assert 0 <= low <= alone <= high <= 1
        assert low < high


def test_colours_run_from_dark_to_light() -> None:
    assert heat_color(0, 0, 1) == (SCALE[0], False)
    assert heat_color(1, 0, 1) == (SCALE[-1], True)
    assert heat_color(0.5, 0, 1)[0] == SCALE[4]
    assert heat_color(9, 0, 1) == heat_color(1, 0, 1)


def test_thinning_keeps_ends_of_every_stretch() -> None:
    points = [(float(x), math.sin(x / 50)) for x in range(10_000)]
    points[4321] = (4321.0, 99.0)
    kept = thinned(points, 100)
    assert len(kept) <= 100
    assert (4321.0, 99.0) in kept
    assert list(kept) == sorted(kept)
    assert set(kept) <= set(points)
    assert thinned(points[:100], 100) == tuple(points[:100])
    noise = [(float(x), float((-1) ** x)) for x in range(1000)]
    assert {y for _, y in thinned(noise, 100)} == {-1.0, 1.0}
    assert len(thinned(noise, 100)) == 100


def test_running_mean() -> None:
    points = [(float(x), y) for x, y in enumerate([3.0, 0.0, 6.0, 3.0, 3.0])]
    assert running_mean(points, 3) == [(0, 3), (1, 3), (2, 3), (3, 4), (4, 3)]
