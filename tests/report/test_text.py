"""Figures for people, at the edges of their units."""

from __future__ import annotations

import pytest

from proxsparse_triton.report.text import duration, figure, increase, percent, plural, setting, size


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (figure(None), "not measured"), (figure(10.61794), "10.618"), (figure(12345.6), "12,346"),
        (percent(None), "-"), (percent(0.8755), "87.5 %"), (percent(1.0), "100.0 %"), (percent(0.99999), "> 99.9 %"),
        (percent(0.0), "0.0 %"), (percent(1e-5), "< 0.1 %"),
        (duration(None), "-"), (duration(28.14), "28.1 s"), (duration(99.94), "99.9 s"), (duration(100), "1 min 40 s"),
        (duration(3599.6), "1 h 00 min"), (duration(7320), "2 h 02 min"),
        (size(None), "-"), (size(139528), "0.14 MB"), (size(636e6), "636 MB"), (size(58.1e9), "58.10 GB"),
        (increase(None, 5.0), "-"), (increase(6.0, 0.0), "-"), (increase(6.0, 5.0), "+20.0 %"), (increase(4.0, 5.0), "-20.0 %"),
        (increase(35.5, 5.0), "x 7.1"),
        (setting(None), "-"), (setting(True), "yes"), (setting(0.0115215), "0.01152"), (setting([]), "none"), (setting([1, "a"]), "1, a"),
        (setting({"a": 1}), "a 1"), (setting(42), "42"),
        (plural(1, "step"), "1 step"), (plural(1234, "step"), "1,234 steps"),
    ],
)  # fmt: skip
def test_figures(found: str, expected: str) -> None:
    assert found == expected
