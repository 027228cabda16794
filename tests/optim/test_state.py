"""Keys of the random bits, and which parameters need them."""

from __future__ import annotations

import itertools

import pytest
import torch

from proxsparse_triton.optim.state import Precision, layout, random_key


def test_keys_are_distinct_and_spread() -> None:
    """Every (seed, step, parameter) draws from a stream of its own; each of the 63 bits is set in about half of the keys."""
    keys = {random_key(*numbers) for numbers in itertools.product(range(4), range(1, 40), range(40))}
    assert len(keys) == 4 * 39 * 40
    assert all(0 <= key < 1 << 63 for key in keys)
    for bit in range(63):
        assert 0.45 < sum(key >> bit & 1 for key in keys) / len(keys) < 0.55
    assert random_key(0, 1, 2) != random_key(0, 2, 1) != random_key(1, 0, 2)
    assert random_key((1 << 64) - 1, 1, 0) >= 0


@pytest.mark.parametrize(
    ("dtype", "bits", "moments", "rounds"),
    [
        (torch.float32, None, "float32", False),
        (torch.float32, 32, "bfloat16", True),
        (torch.bfloat16, None, "float32", True),
        (torch.bfloat16, 24, "float32", True),
        (torch.bfloat16, 32, "float32", False),
        (torch.bfloat16, 32, "int8", True),
        (torch.float64, None, "float32", False),
    ],
)
def test_random_bits_are_drawn_where_something_is_rounded(dtype: torch.dtype, bits: int | None, moments: str, rounds: bool) -> None:
    assert Precision(bits, moments).rounds(torch.zeros(4, 8, dtype=dtype)) is rounds


def test_bytes_of_the_state() -> None:
    """What memory plans count on: bytes per weight beside the weight itself."""
    p = torch.zeros(64, 128, dtype=torch.bfloat16)
    for precision, expected in (
        (Precision(None, "float32"), 8),
        (Precision(16, "bfloat16"), 4),
        (Precision(24, "float32"), 9),
        (Precision(32, "bfloat16"), 6),
        (Precision(16, "int8"), 2 + 2 * 4 / 128),
    ):
        tensors = [torch.empty(shape, dtype=dtype) for dtype, shape in layout(p, precision).values()]
        assert sum(x.numel() * x.element_size() for x in tensors) == expected * p.numel()
