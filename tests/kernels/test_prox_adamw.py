"""Device functions of the fused step that its operation cannot be made to meet everywhere."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from proxsparse_triton.kernels.launch import interpreted  # noqa: E402
from proxsparse_triton.kernels.prox_adamw import _split  # noqa: E402

N = 256


@triton.jit
def split_kernel(x_ptr, random_ptr, y_ptr, RESIDUAL_BITS: tl.constexpr, STOCHASTIC: tl.constexpr, EXPLICIT: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    stored, _ = _split(tl.load(x_ptr + at), tl.load(random_ptr + at), tl.bfloat16, RESIDUAL_BITS, STOCHASTIC, EXPLICIT)
    tl.store(y_ptr + at, stored)


@pytest.mark.parametrize("residual_bits", [0, 8, 16])
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_a_nan_of_all_ones_stays_a_nan(device: str, residual_bits: int, stochastic: bool) -> None:
    """The card's own NaN: anything added to its bits would wrap around to -0.0 and hide it."""
    x = torch.full((N,), 0x7FFFFFFF, dtype=torch.int32, device=device).view(torch.float32)
    random = torch.arange(N, dtype=torch.int32, device=device) * 257
    y = torch.zeros(N, device=device)
    split_kernel[(1,)](x, random, y, RESIDUAL_BITS=residual_bits, STOCHASTIC=stochastic, EXPLICIT=interpreted(split_kernel), N=N)
    assert y.isnan().all()
