"""Sparse layers and their dense twins, shared by the tests of `SparseLinear`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from proxsparse_triton import SparseLinear, mask_24

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(64, 32), (128, 96), (3, 4), (5, 20), (48, 44)]


def weight(out: int, width: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    w = torch.randn(out, width, device=device).to(dtype)
    return w.masked_fill(~mask_24(w.abs()), 0)


def pair(
    out: int, width: int, *, bias: bool = True, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[SparseLinear, nn.Linear]:
    """A packed layer and its dense twin."""
    dense = nn.Linear(width, out, bias=bias, dtype=dtype, device=device).requires_grad_(False)
    dense.weight.copy_(weight(out, width, dtype, device))
    return SparseLinear.from_dense(dense.weight, bias=dense.bias), dense
