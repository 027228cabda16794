"""The scalars of a fused step: their ranges and messages."""

from __future__ import annotations

import dataclasses

import pytest

from proxsparse_triton.errors import ConfigError
from proxsparse_triton.step import StepSettings

GOOD = StepSettings(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=1)
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "values", "rule"),
    [
        ("lr", (-1.0, NAN, INF), "finite and >= 0"),
        ("beta1", (-0.1, 1.0, NAN), r"in \[0, 1\)"),
        ("beta2", (-0.1, 1.0, NAN), r"in \[0, 1\)"),
        ("eps", (-1e-9, NAN), "finite and >= 0"),
        ("weight_decay", (-0.1, INF), "finite and >= 0"),
        ("step", (0, -1), ">= 1"),
        ("lambda1", (-1.0, NAN, INF), "finite and >= 0"),
        ("lambda2", (-1.0, NAN, INF), "finite and >= 0"),
        ("frozen_eps", (0.0, -1.0, INF), "finite and > 0"),
        ("seed", (-1, 1 << 64), r"in \[0, 2\^64\)"),
        ("offset", (-1,), ">= 0"),
    ],
)
def test_ranges(name: str, values: tuple[float, ...], rule: str) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=rf"^StepSettings: expected {name} {rule}, got {value!r}\. Choose another value\.$"):
            dataclasses.replace(GOOD, **{name: value})


def test_limits_are_allowed() -> None:
    dataclasses.replace(GOOD, lr=0.0, beta1=0.0, beta2=0.0, eps=0.0, seed=(1 << 64) - 1, offset=1 << 40)
