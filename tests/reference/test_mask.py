"""The plain-torch mask against a sort in Python."""

from __future__ import annotations

import itertools
import math

import torch

from proxsparse_triton.reference.mask import mask_24

NAN, INF = float("nan"), float("inf")


def by_hand(block: tuple[float, ...]) -> list[bool]:
    order = sorted(range(4), key=lambda i: (-(-INF if math.isnan(block[i]) else block[i]), i))
    return [i in order[:2] for i in range(4)]


def test_every_block_of_special_values() -> None:
    values = (NAN, -INF, -1.0, -0.0, 0.0, 2.0, INF)
    blocks = list(itertools.product(values, repeat=4))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert mask_24(torch.tensor(blocks, dtype=dtype)).tolist() == [by_hand(block) for block in blocks]
